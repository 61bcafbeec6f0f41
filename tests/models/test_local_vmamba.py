"""LocalVMamba: the searched routes, the authors' keys, any image, maps smaller than a window, exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import SS2D
from visionbb.models.local_vmamba import searched
from visionbb.profiling import count_flops

ROUTES = (searched("h v- w7 w7-"), searched("h- v w2 w2-, w2 w7- v h-"), searched("h v- w2- w7"), searched("h h- v w2"))
TINY = dict(embed_dim=8, depths=(1, 2, 1, 1), routes=ROUTES, d_state=2)
DEPTHS = {"local_vmamba_tiny": (2, 2, 9, 2), "local_vmamba_small": (2, 2, 27, 2)}


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("local_vmamba_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def official(depths) -> dict[str, torch.Tensor]:
    """The authors' keys and shapes."""
    shapes = {"patch_embed.0.weight": (96, 3, 4, 4), "patch_embed.0.bias": (96,), "patch_embed.2.weight": (96,),
              "patch_embed.2.bias": (96,), "classifier.norm.weight": (768,), "classifier.norm.bias": (768,),
              "classifier.head.weight": (1000, 768), "classifier.head.bias": (1000,)}
    for stage, depth in enumerate(depths):
        C = 96 * 2**stage
        D, R, attn = 2 * C, C // 16, "op.multi_scan.attn."
        block = {
            "norm.weight": (C,), "norm.bias": (C,), "op.in_proj.weight": (2 * D, C), "op.conv2d.weight": (D, 1, 3, 3),
            "op.conv2d.bias": (D,), "op.x_proj_weight": (4, R + 32, D), "op.dt_projs_weight": (4, D, R),
            "op.dt_projs_bias": (4, D), "op.A_logs": (4 * D, 16), "op.Ds": (4 * D,), "op.out_norm.weight": (D,),
            "op.out_norm.bias": (D,), "op.out_proj.weight": (C, D),
            attn + "norm.weight": (D,), attn + "norm.bias": (D,),
            attn + "global_reduce.weight": (D // 8, D), attn + "global_reduce.bias": (D // 8,),
            attn + "channel_select.weight": (D, D // 8), attn + "channel_select.bias": (D,),
        }
        shapes |= {f"layers.{stage}.blocks.{i}.{key}": shape for i in range(depth) for key, shape in block.items()}
        if stage < 3:
            shapes |= {f"layers.{stage}.downsample.reduction.weight": (2 * C, 4 * C),
                       f"layers.{stage}.downsample.norm.weight": (4 * C,),
                       f"layers.{stage}.downsample.norm.bias": (4 * C,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", DEPTHS)
def test_the_authors_keys_load_into_every_variant(name):
    model = timm.create_model(name, device="meta")
    weights = official(DEPTHS[name])
    model.load_state_dict({"state_dict": weights}, assign=True)
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())


def test_short_names_of_routes():
    assert searched("h v- w7 w2-, v") == (("row", "column_reversed", "window7", "window2_reversed"), ("column",))


@pytest.mark.parametrize("name", DEPTHS)
def test_every_layer_has_four_different_routes_of_its_own(name):
    model = timm.create_model(name, device="meta")
    blocks = [block.mixer for stage in model.stages for block in stage.blocks]
    assert len(blocks) == sum(DEPTHS[name])
    assert all(len(set(mixer.routes)) == 4 and mixer.merge == "stack" for mixer in blocks)
    assert len({tuple(mixer.routes) for mixer in blocks}) > 10
    kinds = {route.removesuffix("_reversed") for mixer in blocks for route in mixer.routes}
    assert kinds == {"row", "column", "window2", "window7"}


def test_shorter_lists_of_routes_repeat():
    model = tiny(depths=(3, 1), routes=ROUTES[1::-1])
    assert [tuple(block.mixer.routes) for block in model.stages[0].blocks] == [*ROUTES[1], ROUTES[1][0]]
    with pytest.raises(ValueError, match="routes must have one list, not empty, for each of 4 stages"):
        tiny(routes=ROUTES[:3])
    with pytest.raises(ValueError, match="routes must have one list, not empty, for each of 4 stages"):
        tiny(routes=(*ROUTES[:3], ()))


def test_cost_grows_with_the_number_of_pixels():
    model = timm.create_model("local_vmamba_tiny", device="meta")
    assert count_flops(model, 896).flops / count_flops(model, 448).flops == pytest.approx(4, rel=1e-3)


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def test_columns_of_a_map_are_rows_of_its_transpose():
    """Of maps that are not square, too."""
    columns, rows = (tiny(routes=(searched(names),) * 4).stages[0].blocks[0] for names in ("v v-", "h h-"))
    with torch.no_grad():
        rows.mixer.conv.weight.copy_(columns.mixer.conv.weight.transpose(2, 3))
    x = torch.randn(2, 7, 4, 8)
    torch.testing.assert_close(columns(x), rows(x.transpose(1, 2)).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_scan_parameters_are_kept_from_weight_decay():
    model = tiny()
    scans = [key for key, m in model.named_modules() if isinstance(m, SS2D)]
    assert model.no_weight_decay() == {f"{key}.{name}" for key in scans for name in ("A_log", "D", "dt_bias")}


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(depths=(1, 1), routes=ROUTES[:2])
    compiles_in_one_graph(model, images(64, 64))


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depths=(1,), routes=ROUTES[2:3])
    onnxruntime_agrees(model, images(28, 20))
