"""EfficientVMamba: shared-out maps, two branches under one gate, any image, the authors' files, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from visionbb.mixers import SS2D
from visionbb.models.efficient_vmamba import ConvBlock, ScanConvBlock
from visionbb.profiling import count_flops

GOLDEN = "tests/golden/efficient_vmamba.safetensors"
TINY = dict(embed_dim=8, depths=(1, 2, 1, 1))


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("efficient_vmamba_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def official(width: int, depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The authors' keys and shapes, without batch norms' counters."""
    def norm(key, C, batch=False):
        names = ("weight", "bias", "running_mean", "running_var") if batch else ("weight", "bias")
        return {f"{key}.{name}": (C,) for name in names}

    shapes = {"patch_embed.0.weight": (width, 3, 4, 4), "patch_embed.0.bias": (width,), **norm("patch_embed.2", width),
              **norm("classifier.norm", 8 * width), "classifier.head.weight": (1000, 8 * width),
              "classifier.head.bias": (1000,)}
    for stage, depth in enumerate(depths):
        C = width * 2**stage
        D, R, mid = 2 * C, C // 16, 4 * C
        scan = {
            **norm("norm", C), "op.in_proj.weight": (2 * D, C),
            "op.conv2d.weight": (D, 1, 3, 3), "op.conv2d.bias": (D,),
            "op.x_proj_weight": (4, R + 32, D), "op.dt_projs_weight": (4, D, R), "op.dt_projs_bias": (4, D),
            "op.A_logs": (4 * D, 16), "op.Ds": (4 * D,), **norm("op.out_norm", D), "op.out_proj.weight": (C, D),
            "conv_branch.0.weight": (C, 1, 3, 3), "conv_branch.0.bias": (C,), **norm("conv_branch.1", C, True),
            "conv_branch.3.weight": (C, C, 1, 1), "conv_branch.3.bias": (C,), **norm("se.norm", C),
            "se.global_reduce.weight": (C // 8, C), "se.global_reduce.bias": (C // 8,),
            "se.channel_select.weight": (C, C // 8), "se.channel_select.bias": (C,),
        }
        bottleneck = {
            "conv_pw.0.weight": (mid, C, 1, 1), **norm("conv_pw.1", mid, True),
            "conv_dw.0.weight": (mid, 1, 3, 3), **norm("conv_dw.1", mid, True),
            "se.conv_reduce.weight": (mid // 8, mid, 1, 1), "se.conv_reduce.bias": (mid // 8,),
            "se.conv_expand.weight": (mid, mid // 8, 1, 1), "se.conv_expand.bias": (mid,),
            "conv_pw2.0.weight": (C, mid, 1, 1), **norm("conv_pw2.1", C, True),
        }
        for i in range(depth):
            path, block = (f"blocks.{i}", scan) if stage < 2 else (f"{i + 1}", bottleneck)
            shapes |= {f"layers.{stage}.{path}.{key}": shape for key, shape in block.items()}
        if stage < 3:
            path = f"layers.{stage}." + ("downsample" if stage < 2 else f"{depth + 2}")
            shapes |= {f"{path}.reduction.weight": (2 * C, 4 * C), **norm(f"{path}.norm", 4 * C)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


VARIANTS = {"tiny": (48, (2, 2, 4, 2)), "small": (64, (2, 2, 4, 2)), "base": (96, (2, 2, 9, 2))}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_authors_keys_load_into_every_variant(name):
    model = timm.create_model(f"efficient_vmamba_{name}", device="meta")
    weights = official(*VARIANTS[name])
    model.load_state_dict({"state_dict": {f"module.module.{key}": w for key, w in weights.items()}}, assign=True)
    learned = sum(w.numel() for key, w in weights.items() if "running" not in key)
    assert sum(p.numel() for p in model.parameters()) == learned


@pytest.mark.parametrize(("name", "width", "layers"), [("tiny", 48, 4), ("small", 64, 4), ("base", 96, 9)])
def test_scans_in_the_first_half_and_convolutions_in_the_second(name, width, layers):
    model = timm.create_model(f"efficient_vmamba_{name}", device="meta")
    kinds = [[type(block) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[ScanConvBlock] * 2, [ScanConvBlock] * 2, [ConvBlock] * layers, [ConvBlock] * 2]
    assert model.stages[0].blocks[0].mixer.A_log.shape == (4, 2 * width, 16)
    assert model.stages[0].blocks[0].attn.fc1.out_features == width // 8
    assert model.stages[2].blocks[0].bottleneck.se.conv_reduce.out_channels == 2 * width


def test_cost_grows_with_the_number_of_pixels():
    model = timm.create_model("efficient_vmamba_tiny", device="meta")
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


def test_a_scan_alone_stays_on_its_sub_grid():
    """Up to the convolution before it, which reaches one token; each sub-grid is walked once, from its first token."""
    mixer = tiny().stages[0].blocks[0].mixer
    x = torch.randn(1, 12, 10, 8, requires_grad=True)
    with torch.no_grad():
        mixer.conv.weight.mul_(torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    mixer(x)[0, 6, 4].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen[::2, ::2].nonzero().tolist() == [[i, j] for i in range(4) for j in range(5) if (i, j) <= (3, 2)]
    seen[::2, ::2] = False
    assert not bool(seen.any())


def test_one_gate_serves_both_branches():
    block = tiny().stages[1].blocks[0]
    x = torch.randn(2, 6, 5, 16)
    h = block.norm1(x)
    with torch.no_grad():
        block.mixer.out_proj.weight.zero_()
        local = block(x) - x
        want = block.conv_pw(nn.functional.gelu(block.conv_norm(block.conv(h).permute(0, 3, 1, 2))))
        torch.testing.assert_close(local, block.attn(want.permute(0, 2, 3, 1)), rtol=1e-4, atol=1e-5)


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
    assert len(scans) == 3
    assert model.no_weight_decay() == {f"{key}.{name}" for key in scans for name in ("A_log", "D", "dt_bias")}


def test_files_of_the_authors_training_load(tmp_path, request):
    """Their averaged weights stand in two wrappers."""
    recorded = load_file(request.config.rootpath / GOLDEN)
    weights = {
        key.replace("weights.", "module.module."): x for key, x in recorded.items() if key.startswith("weights.")
    }
    torch.save({"state_dict": weights}, tmp_path / "authors.ckpt")
    args = dict(embed_dim=8, depths=(1, 2, 2, 1), num_classes=7, checkpoint_path=tmp_path / "authors.ckpt")
    model = timm.create_model("efficient_vmamba_tiny", **args).eval()
    torch.testing.assert_close(model(recorded["input"]), recorded["output"], rtol=1e-4, atol=1e-4)


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    path = tmp_path / "own.pth"
    again = timm.create_model("efficient_vmamba_tiny", **TINY, num_classes=5, checkpoint_path=path).eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(depths=(1, 0, 1))
    compiles_in_one_graph(model, images(64, 64))


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depths=(1,))
    onnxruntime_agrees(model, images(28, 20))


def test_errors():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of 8, got 12"):
        tiny(embed_dim=12)
