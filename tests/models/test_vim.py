"""Vim: the class token in the middle, a float32 stream, any image, the authors' files, weights and exports."""
from __future__ import annotations

import argparse
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from visionbb.profiling import count_flops

TINY = dict(embed_dim=16, depth=3, d_state=4, img_size=64)
SIZES = {"vim_tiny": 192, "vim_tiny_stride8": 192, "vim_small": 384, "vim_small_stride8": 384, "vim_base": 768}


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def official(C: int, side: int) -> dict[str, torch.Tensor]:
    """The authors' keys and shapes."""
    D, R = 2 * C, C // 16
    shapes = {
        "cls_token": (1, 1, C), "pos_embed": (1, 1 + side**2, C), "patch_embed.proj.weight": (C, 3, 16, 16),
        "patch_embed.proj.bias": (C,), "norm_f.weight": (C,), "head.weight": (1000, C), "head.bias": (1000,),
    }
    for i in range(24):
        shapes |= {f"layers.{i}.norm.weight": (C,), f"layers.{i}.mixer.in_proj.weight": (4 * C, C),
                   f"layers.{i}.mixer.out_proj.weight": (C, D)}
        for b in ("", "_b"):
            scan = {f"A{b}_log": (D, 16), f"D{b}": (D,), f"conv1d{b}.weight": (D, 1, 4), f"conv1d{b}.bias": (D,),
                    f"x_proj{b}.weight": (R + 32, D), f"dt_proj{b}.weight": (D, R), f"dt_proj{b}.bias": (D,)}
            shapes |= {f"layers.{i}.mixer.{key}": shape for key, shape in scan.items()}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", SIZES)
def test_the_authors_keys_load_into_every_variant(name):
    model = timm.create_model(name, device="meta")
    weights = official(SIZES[name], 27 if "stride8" in name else 14)
    model.load_state_dict(weights, assign=True)
    # Theirs have the class token's position apart.
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values()) - SIZES[name]


def test_cost_grows_with_the_number_of_patches():
    model = timm.create_model("vim_tiny", device="meta")
    assert count_flops(model, 896).flops / count_flops(model, 448).flops == pytest.approx(4, rel=1e-2)


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        h, w = math.ceil(H / 16), math.ceil(W / 16)
        assert final.shape == (2, 1 + h * w, 16)
        assert model.forward_head(final).isfinite().all()
        assert all(x.shape == (2, 16, h, w) for x in maps)
        torch.testing.assert_close(final[:, 1:].unflatten(1, (h, w)), model.norm(maps[-1].permute(0, 2, 3, 1)))
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)


def test_the_class_token_stands_in_the_middle_for_the_blocks_and_in_front_outside():
    model = tiny()
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    out = {}
    model.blocks[-1].register_forward_hook(lambda module, args, result: out.update(tokens=result))
    final = model.forward_features(images(64, 48))
    torch.testing.assert_close(seen["tokens"][:, 6], model.stem.cls_token[0].expand(2, -1))
    torch.testing.assert_close(final[:, 0], model.norm(out["tokens"][:, 6]))
    torch.testing.assert_close(final[:, 1:7], model.norm(out["tokens"][:, :6]))
    torch.testing.assert_close(model.forward_head(final), model.head.fc(final[:, 0]))


def test_the_class_token_hears_every_patch():
    model = tiny(depth=1)
    x = images(64, 64).requires_grad_()
    model(x)[0].sum().backward()
    patches = F.avg_pool2d(x.grad[0].abs().sum(0, keepdim=True), 16)
    assert bool((patches > 0).all())
    assert not bool(x.grad[1].any())


def test_the_stream_between_blocks_is_float32():
    model = tiny().bfloat16()
    kinds = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, result: kinds.append(result.dtype))
    final, maps = model.forward_intermediates(images(64, 64).bfloat16())
    assert kinds == [torch.float32] * 3
    assert {final.dtype, *(x.dtype for x in maps)} == {torch.bfloat16}
    want = tiny()(images(64, 64))
    assert F.cosine_similarity(model(images(64, 64).bfloat16()).float().flatten(), want.flatten(), 0) > 0.99


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_what_blocks_add_begins_small_in_a_deep_network():
    small, large = (timm.create_model("vim_tiny", depth=depth) for depth in (1, 16))
    deviations = [model.blocks[0].mixer.out_proj.weight.detach().std() for model in (small, large)]
    assert deviations[0] / deviations[1] == pytest.approx(4, rel=0.05)


def test_scan_parameters_and_positions_are_kept_from_weight_decay():
    model = tiny()
    scans = [f"blocks.{i}.mixer.{s6}" for i in range(3) for s6 in ("s6", "s6_reverse")]
    scanned = {f"{scan}.{name}" for scan in scans for name in ("A_log", "D", "dt_bias")}
    found = model.no_weight_decay() & dict(model.named_parameters()).keys()
    assert found == scanned | {"stem.cls_token", "stem.pos_embed"}


def recorded(request):
    tensors = load_file(request.config.rootpath / "tests/golden/vim.safetensors")
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    return tensors, weights


def test_the_authors_files_with_their_command_line_load(tmp_path, request):
    tensors, weights = recorded(request)
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3), "epoch": 299}, tmp_path / "authors.pth")
    args = dict(img_size=48, embed_dim=16, depth=3, d_state=4, num_classes=7)
    model = timm.create_model("vim_tiny_stride8", **args, checkpoint_path=tmp_path / "authors.pth").eval()
    torch.testing.assert_close(model(tensors["input"]), tensors["output"], rtol=1e-4, atol=1e-4)


def test_checkpoints_of_another_map_are_resampled(request):
    """As the authors fine-tune: from patches side by side to overlapping ones."""
    _, weights = recorded(request)
    model = timm.create_model("vim_tiny", img_size=64, embed_dim=16, depth=3, d_state=4, num_classes=7)
    model.load_state_dict(weights)
    pos = weights["pos_embed"]
    grid = torch.cat((pos[:, :12], pos[:, 13:]), 1).mT.unflatten(2, (5, 5))
    want = F.interpolate(grid, (4, 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.stem.pos_embed, want)
    torch.testing.assert_close(model.stem.cls_token, weights["cls_token"] + pos[:, 12:13])


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("vim_tiny", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depth=1)
    onnxruntime_agrees(model, images(64, 56))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(depth=1)
    compiles_in_one_graph(model, images(64, 64))
