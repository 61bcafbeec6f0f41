"""MambaVision: kinds of blocks, windows, time steps with a doubled bias, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.mixers import S6, MambaVisionMixer, SoftmaxAttention
from visionbb.models.mambavision import VARIANTS, ConvBlock, WindowStage
from visionbb.profiling import count_flops

TWO_STAGES = dict(depths=(1, 2), num_heads=(1, 2), window_size=(0, 4))  # where a graph of all four costs seconds
TINY = dict(stem_dim=6, embed_dim=8, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4), window_size=(0, 0, 4, 2),
            layer_scale=1e-5)  # fmt: skip


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("mambavision_base", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def official(stem_dim, embed_dim, depths, layer_scale=None, **_) -> dict[str, torch.Tensor]:
    """The authors' keys and shapes."""
    shapes = {}

    def norm(key, dim, batch=False):
        shapes.update({f"{key}.weight": (dim,), f"{key}.bias": (dim,)})
        if batch:
            shapes.update({f"{key}.running_mean": (dim,), f"{key}.running_var": (dim,),
                           f"{key}.num_batches_tracked": ()})

    def linear(key, out, *rest, bias=True):
        shapes.update({f"{key}.weight": (out, *rest)} | ({f"{key}.bias": (out,)} if bias else {}))

    linear("patch_embed.conv_down.0", stem_dim, 3, 3, 3, bias=False)
    norm("patch_embed.conv_down.1", stem_dim, batch=True)
    linear("patch_embed.conv_down.3", embed_dim, stem_dim, 3, 3, bias=False)
    norm("patch_embed.conv_down.4", embed_dim, batch=True)
    for level, depth in enumerate(depths):
        dim = embed_dim * 2**level
        for i in range(depth):
            block = f"levels.{level}.blocks.{i}"
            if level < 2:
                for k in (1, 2):
                    linear(f"{block}.conv{k}", dim, dim, 3, 3)
                    norm(f"{block}.norm{k}", dim, batch=True)
                continue
            for k in (1, 2):
                norm(f"{block}.norm{k}", dim)
                if layer_scale:
                    shapes[f"{block}.gamma_{k}"] = (dim,)
            linear(f"{block}.mlp.fc1", 4 * dim, dim)
            linear(f"{block}.mlp.fc2", dim, 4 * dim)
            mixer = f"{block}.mixer"
            if i in range((depth + 1) // 2, depth):
                linear(f"{mixer}.qkv", 3 * dim, dim)
                linear(f"{mixer}.proj", dim, dim)
            else:
                half, rank = dim // 2, math.ceil(dim / 16)
                shapes |= {f"{mixer}.A_log": (half, 8), f"{mixer}.D": (half,)}
                linear(f"{mixer}.in_proj", dim, dim, bias=False)
                linear(f"{mixer}.out_proj", dim, dim, bias=False)
                linear(f"{mixer}.x_proj", rank + 16, half, bias=False)
                linear(f"{mixer}.dt_proj", half, rank)
                for branch in "xz":
                    linear(f"{mixer}.conv1d_{branch}", half, 1, 3, bias=False)
        if level < 3:
            linear(f"levels.{level}.downsample.reduction.0", 2 * dim, dim, 3, 3, bias=False)
    norm("norm", 8 * embed_dim, batch=True)
    linear("head", 1000, 8 * embed_dim)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_authors_keys_load_into_every_variant(name):
    model = timm.create_model(name, device="meta")
    model.load_state_dict(official(**VARIANTS[name]), assign=True)


def test_mambas_come_before_attention():
    model = timm.create_model("mambavision_small", device="meta")
    assert all(type(block) is ConvBlock for stage in model.stages[:2] for block in stage.blocks)
    kinds = [[type(block.mixer) for block in stage.blocks] for stage in model.stages[2:]]
    assert kinds == [[MambaVisionMixer] * 4 + [SoftmaxAttention] * 3, [MambaVisionMixer] * 3 + [SoftmaxAttention] * 2]


@pytest.mark.parametrize(("name", "windows"), [
    ("mambavision_large2", (14, 7)), ("mambavision_large2.in21k_ft_in1k_512", (32, 16)),
    ("mambavision_large3", (16, 8)), ("mambavision_large3.in21k_ft_in1k_512", (32, 16)),
])
def test_windows_go_with_the_resolution_of_the_weights(name, windows):
    model = timm.create_model(name, device="meta")
    assert tuple(stage.window_size for stage in model.stages[2:]) == windows
    # At that resolution they are the whole map.
    side = model.pretrained_cfg["input_size"][-1]
    assert tuple(side // info["reduction"] for info in model.feature_info[2:]) == windows


def test_cost_grows_with_the_number_of_windows():
    model = timm.create_model("mambavision_tiny", device="meta")
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


def test_tokens_see_their_window_and_no_other():
    stage = tiny().stages[2]
    assert isinstance(stage, WindowStage)
    stage.downsample = nn.Identity()
    x = torch.randn(1, 6, 9, 32, requires_grad=True)
    stage(x)[0, 1, 5].sum().backward()
    seen = x.grad.abs().sum(-1)[0] > 0
    assert bool(seen[:4, 4:8].all())
    assert int(seen.sum()) == 16


def test_padding_takes_part_in_all_blocks_of_a_stage():
    """As a map with zeros around it, of which the blocks see all, and the result nothing."""
    stage = tiny().stages[2]
    stage.downsample = nn.Identity()
    x = torch.randn(2, 6, 5, 32)
    torch.testing.assert_close(stage(x), stage(F.pad(x, (0, 0, 0, 3, 0, 2)))[:, :6, :5])


def test_biases_of_time_steps_come_doubled():
    """Theirs stand in the projection, W low + b, and once more in the scan: softplus(W low + b + b)."""
    model = timm.create_model("mambavision_tiny", device="meta")
    weights = official(**VARIANTS["mambavision_tiny"])
    key = "levels.2.blocks.1.mixer.dt_proj.bias"
    weights[key] = torch.arange(160.0)
    ours = model.checkpoint_filter_fn(weights, model)
    assert torch.equal(ours["stages.2.blocks.1.mixer.s6.dt_bias"], 2 * torch.arange(160.0))
    assert model.checkpoint_filter_fn(ours, model).keys() == ours.keys()
    assert torch.equal(model.checkpoint_filter_fn(ours, model)["stages.2.blocks.1.mixer.s6.dt_bias"],
                       2 * torch.arange(160.0))  # not once more


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
    scans = [key for key, m in model.named_modules() if isinstance(m, S6)]
    assert model.no_weight_decay() == {f"{key}.{name}" for key in scans for name in ("A_log", "D", "dt_bias")}


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    args = {**TINY, "num_classes": 5, "checkpoint_path": tmp_path / "own.pth"}
    again = timm.create_model("mambavision_base", **args).eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(**TWO_STAGES)
    onnxruntime_agrees(model, images(40, 56))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(**TWO_STAGES)
    compiles_in_one_graph(model, images(64, 64))
