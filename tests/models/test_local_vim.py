"""LocalVim: the searched routes, a stream that turns, a class token in the middle, the authors' keys, any image."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import LocalMamba
from visionbb.models.local_vim import MapRotary
from visionbb.models.local_vmamba import searched
from visionbb.profiling import count_flops

ROUTES = searched("h v- w7 w2-, v h- w2 w7-")
TINY = dict(embed_dim=16, depth=3, d_state=4, img_size=64, routes=ROUTES)
WIDTHS = {"local_vim_tiny": 192, "local_vim_small": 384, "local_vim_tiny_middle_cls_token": 192}
NAMES = ("local_vim_tiny", "local_vim_tiny_middle_cls_token")


def tiny(name="local_vim_tiny", **kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def official(C: int, class_token: bool) -> dict[str, torch.Tensor]:
    """The authors' keys and shapes."""
    D, R = 2 * C, C // 16
    shapes = {
        "pos_embed": (1, 196 + class_token, C), "patch_embed.proj.weight": (C, 3, 16, 16),
        "patch_embed.proj.bias": (C,), "norm_f.weight": (C,), "head.weight": (1000, C), "head.bias": (1000,),
    }
    shapes |= {"cls_token": (1, 1, C)} if class_token else {"rope.freqs_cos": (196, C), "rope.freqs_sin": (196, C)}
    for i in range(20):
        layer = {
            "norm.weight": (C,), "mixer.in_proj.weight": (4 * C, C), "mixer.out_proj.weight": (C, D),
            "mixer.attn.norm.weight": (D,), "mixer.attn.norm.bias": (D,),
            "mixer.attn.global_reduce.weight": (D // 8, D), "mixer.attn.global_reduce.bias": (D // 8,),
            "mixer.attn.channel_select.weight": (D, D // 8), "mixer.attn.channel_select.bias": (D,),
        }
        for k in range(4):
            scan = {f"A_log_{k}": (D, 16), f"D_{k}": (D,), f"conv1d_{k}.weight": (D, 1, 4), f"conv1d_{k}.bias": (D,),
                    f"x_proj_{k}.weight": (R + 32, D), f"dt_proj_{k}.weight": (D, R), f"dt_proj_{k}.bias": (D,)}
            layer |= {f"mixer.{key}": shape for key, shape in scan.items()}
        shapes |= {f"layers.{i}.{key}": shape for key, shape in layer.items()}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_authors_keys_load_into_every_variant(name):
    model, class_token = timm.create_model(name, device="meta"), "cls" in name
    weights = official(WIDTHS[name], class_token)
    model.load_state_dict({"state_dict": weights}, assign=True)
    theirs = sum(w.numel() for key, w in weights.items() if not key.startswith("rope"))
    # Theirs have the class token's position apart.
    assert sum(p.numel() for p in model.parameters()) == theirs - class_token * WIDTHS[name]


def test_positions_of_a_checkpoint_are_resampled():
    weights = official(192, False)
    weights["pos_embed"] = torch.randn(1, 196, 192)
    for img_size, grid in ((224, (14, 14)), ((320, 160), (20, 10))):
        model = timm.create_model("local_vim_tiny", img_size=img_size, device="meta")
        model.load_state_dict(weights, assign=True)
        assert model.pos_embed.weight.shape[1:3] == grid
    resampled = nn.functional.interpolate(weights["pos_embed"].view(1, 14, 14, 192).permute(0, 3, 1, 2), (20, 10),
                                          mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed.weight.detach(), resampled.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", WIDTHS)
def test_routes_of_the_layers(name):
    mixers = [block.mixer for block in timm.create_model(name, device="meta").blocks]
    assert len(mixers) == 20
    assert all(type(mixer) is LocalMamba and len(mixer.s6) == 4 for mixer in mixers)
    found = {tuple(mixer.routes) for mixer in mixers}
    if "small" in name:
        assert found == {("row", "row_reversed", "window2", "window2_reversed")}
    else:
        assert mixers[0].routes == ["row", "column_reversed", "window7", "window7_reversed"]
        assert mixers[19].routes == ["column", "column_reversed", "window2", "window2_reversed"]
        assert len(found) == 15


@pytest.mark.parametrize(("H", "W"), [(14, 14), (5, 21)])
def test_angles_span_the_same_range_on_every_map(H, W):
    rotary = MapRotary(8, size=14)
    x = torch.zeros(1, H, W, 8)
    x[..., ::2] = 1.0  # pairs (1, 0), which turn to (cos, sin)
    pairs = rotary(x).unflatten(-1, (4, 2))
    angle = torch.stack([n * 14 / H * torch.tensor([1.0, 0.01]) for n in range(H)])[:, None].expand(-1, W, -1)
    across = torch.stack([n * 14 / W * torch.tensor([1.0, 0.01]) for n in range(W)]).expand(H, -1, -1)
    angle = torch.cat((angle, across), -1)
    torch.testing.assert_close(pairs[0], torch.stack((angle.cos(), angle.sin()), -1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="dim must be a multiple of 4, got 6"):
        MapRotary(6)


def test_the_stream_turns_once_a_layer():
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight.zero_()
    x = model.forward_stem(images(48, 64))
    want = x
    for _ in range(3):
        want = MapRotary(16)(want)
    _, maps = model.forward_intermediates(images(48, 64))
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_model_takes_any_image(name):
    model = tiny(name)
    first = model(images(96, 64))
    for H, W in ((97, 131), (33, 40), (16, 4)):
        _, maps = model.forward_intermediates(images(H, W))
        assert model(images(H, W)).isfinite().all()
        assert [x.shape for x in maps] == [(2, 16, math.ceil(H / 16), math.ceil(W / 16))] * 3
    torch.testing.assert_close(model(images(96, 64)), first, rtol=0, atol=0)


def test_the_class_token_sees_half_of_every_route():
    model = tiny("local_vim_tiny_middle_cls_token", depth=1, routes=searched("h"))
    x = torch.randn(1, 21, 16, requires_grad=True)  # a map of 4 x 5, the class token behind ten patches
    model.blocks[0](x, 4, 5)[0, 10].sum().backward()
    # The gate is the same for all tokens, and looks at all of them: what the scan alone reads is far more.
    seen = x.grad[0].abs().sum(-1)
    assert seen[:11].min() > 0
    with torch.no_grad():
        for p in model.blocks[0].mixer.attn.parameters():
            p.zero_()
    x.grad = None
    model.blocks[0](x, 4, 5)[0, 10].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [True] * 11 + [False] * 10


@pytest.mark.parametrize("name", NAMES)
def test_trains_on_a_float32_stream(name):
    model = tiny(name, drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
    narrow, kinds = tiny(name).bfloat16(), []
    for block in narrow.blocks:
        block.register_forward_hook(lambda module, args, result: kinds.append(result.dtype))
    final, maps = narrow.forward_intermediates(images(64, 64).bfloat16())
    assert kinds == [torch.float32] * 3
    assert {final.dtype, *(x.dtype for x in maps)} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_positions_and_scan_parameters_are_kept_from_weight_decay(name):
    model = tiny(name)
    scans = {f"blocks.{i}.mixer.s6.{k}.{p}" for i in range(3) for k in range(4) for p in ("A_log", "D", "dt_bias")}
    positions = {"stem.cls_token", "stem.pos_embed"} if "cls" in name else {"pos_embed.weight"}
    assert model.no_weight_decay() == scans | positions


def test_layers_begin_small_in_a_deep_column():
    models = (timm.create_model("local_vim_tiny", embed_dim=64, depth=n, routes=ROUTES) for n in (1, 16))
    shallow, deep = (model.blocks[0].mixer.out_proj.weight.std().item() for model in models)
    assert shallow / deep == pytest.approx(4, rel=0.05)


def test_cost_grows_with_the_number_of_pixels():
    model = timm.create_model("local_vim_tiny", device="meta")
    assert count_flops(model, 448).flops / count_flops(model, 224).flops == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(compiles_in_one_graph, name):
    model = tiny(name, depth=1)
    compiles_in_one_graph(model, images(64, 64))


@pytest.mark.parametrize("name", NAMES)
def test_scripts(name, tmp_path):
    model = tiny(name)
    torch.jit.script(model).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for H, W in ((64, 64), (40, 97)):
        torch.testing.assert_close(scripted(images(H, W)), model(images(H, W)))


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depth=1, routes=searched("v w2-"))
    onnxruntime_agrees(model, images(48, 32))
