"""SG-Former: keys by significance, the authors' keys of every size, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import HybridScaleAttention, LocalSumAttention, SelfGuidedAttention, slabs
from visionbb.models.sg_former import VARIANTS, GuidedPair

TINY = dict(embed_dim=8, depths=(2, 2, 3, 1), num_heads=(2, 2, 2, 4), mlp_ratio=2.0)
TWO_STAGES = dict(depths=(2, 1), num_heads=(2, 2))  # where a graph of all four costs seconds


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("sgformer_small", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def authors_shapes(dim, depths, heads, img_size=224) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of the authors."""
    shapes = {"pos_embed": (1, (img_size // 4) ** 2, dim)}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    for i, width in enumerate((3, dim, dim)):
        layer(f"patch_embed1.conv.{2 * i}.c", dim, width, 3, 3, bias=False)
        layer(f"patch_embed1.conv.{2 * i}.bn", dim)
    layer("patch_embed1.norm", dim)
    for stage, depth in enumerate(depths):
        C, ratio = dim * 2**stage, (8, 4, 2, 1)[stage]
        if stage:
            for i, (width, side) in enumerate(((C // 2, 1), (1, 3), (C, 1)), 1):
                layer(f"patch_embed{stage + 1}.conv{i}.c", C, width, side, side, bias=False)
                layer(f"patch_embed{stage + 1}.conv{i}.bn", C)
        layer(f"norm{stage + 1}", C)
        for j in range(depth):
            block = f"block{stage + 1}.{j}"
            layer(f"{block}.norm1", C)
            layer(f"{block}.norm2", C)
            layer(f"{block}.mlp.fc1", 4 * C, C)
            layer(f"{block}.mlp.dwconv.dwconv", 4 * C, 1, 3, 3)
            layer(f"{block}.mlp.fc2", C, 4 * C)
            attn = f"{block}.attn"
            layer(f"{attn}.lepe_linear", C, C)
            layer(f"{attn}.lepe_conv", C, 1, 3, 3)
            layer(f"{attn}.proj", C, C)
            if stage == 3:
                layer(f"{attn}.q", C, C)
                layer(f"{attn}.kv", 2 * C, C)
            elif j % 2:
                for name in ("q", "kv1", "kv2"):
                    layer(f"{attn}.{name}", C, C)
                for i, size in enumerate({8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}[ratio], 1):
                    layer(f"{attn}.f{i}", 1, size)
            else:
                layer(f"{attn}.sr", C, C, ratio, ratio)
                layer(f"{attn}.norm", C)
                for name, width in (("q1", C // 2), ("q2", C // 2), ("kv1", C), ("kv2", C)):
                    layer(f"{attn}.{name}", width, C)
    layer("head", 1000, 8 * dim)
    return shapes


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_of_the_authors_fit(name):
    model = timm.create_model(name, device="meta")
    shapes = authors_shapes(*(VARIANTS[name][key] for key in ("embed_dim", "depths", "num_heads")))
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model.load_state_dict({"state_dict_ema": checkpoint}, assign=True)  # strict
    assert sum(x.numel() for x in checkpoint.values()) == sum(p.numel() for p in model.parameters())


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("sgformer_small", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_blocks_come_in_pairs_and_the_last_stage_is_plain():
    model = timm.create_model("sgformer_small", device="meta")
    mixers = [type(m) for m in model.modules() if isinstance(m, LocalSumAttention)]
    assert mixers == [HybridScaleAttention, SelfGuidedAttention] * (1 + 2 + 8) + [LocalSumAttention]
    rates = [m.drop_prob for key, m in model.named_modules() if key.endswith("drop_path1") and hasattr(m, "drop_prob")]
    assert rates == pytest.approx([0.1 * i / 22 for i in range(1, 23)])  # the first has none


def test_an_odd_stage_ends_without_a_guided_block():
    pairs = [m for m in tiny().modules() if isinstance(m, GuidedPair)]
    assert [pair.guided is None for pair in pairs] == [False, False, False, True]


def recorded(model, x, cls):
    """Inputs and outputs of all mixers of a kind."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append((m, args, out)))
        for m in model.modules() if type(m) is cls
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_block_is_guided_by_the_one_before():
    model, x = tiny(), images(64, 96)
    maps = [out[1] for _, _, out in recorded(model, x, HybridScaleAttention)]
    guides = [args[1] for _, args, _ in recorded(model, x, SelfGuidedAttention)]
    assert [m.shape for m in maps] == [(2, 16, 24), (2, 8, 12), (2, 4, 6), (2, 4, 6)]
    for guide, significance in zip(guides, maps[:3], strict=True):
        torch.testing.assert_close(guide, significance, rtol=0, atol=0)


def test_keys_at_224():
    """As many as the authors' token numbers come to."""
    model = tiny()
    keys = []
    for m in model.modules():
        if isinstance(m, SelfGuidedAttention):
            m.kv.register_forward_hook(lambda m, args, out: keys.append(out.shape[1]))
    model(images(224, 224))
    assert keys == [4 + 28 + 28, 4 + 28 + 28, 49 + 98]


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def test_positions_begin_as_sines_and_cosines():
    table = timm.create_model("sgformer_small", pos_embed_size=(6, 9), **TINY).stem.pos_embed.weight[0]
    omega = 10000.0 ** (-torch.arange(2) / 2)
    for angles, part in ((torch.arange(9.0), table[2, :, :4]), (torch.arange(6.0), table[:, 5, 4:])):
        angles = angles[:, None] * omega
        torch.testing.assert_close(part.detach(), torch.cat((angles.sin(), angles.cos()), 1))


def test_convolutions_begin_by_their_fan_out():
    """The weights that an input has a part in have variances of two in sum."""
    torch.manual_seed(0)
    model = timm.create_model("sgformer_small", **TWO_STAGES)
    for conv, fan_out in (
        (model.stem.conv2, 64 * 9), (model.stages[0].blocks[0].hybrid.mixer.reduce, 64 * 64),
        (model.stages[0].blocks[0].hybrid.mlp.conv, 9), (model.stages[1].downsample.conv2, 9),
    ):
        assert fan_out * conv.weight.var().item() == pytest.approx(2, rel=0.15)


def test_few_images_at_a_time_give_what_all_give(monkeypatch):
    model, x = tiny(), images(64, 48).repeat(2, 1, 1, 1)
    with torch.no_grad():
        want = model(x)
        monkeypatch.setattr(slabs, "WIDEST_HIDDEN", 0)
        torch.testing.assert_close(model(x), want)


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_positions_are_kept_from_weight_decay():
    assert tiny().no_weight_decay() == {"stem.pos_embed.weight"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(sr_ratios=(8, 4, 3)), r"sr_ratios must be 3 of 2, 4, 8, got \(8, 4, 3\)"),
        (dict(sr_ratios=(8, 4)), "sr_ratios must be 3"),
        (dict(num_heads=(2, 2)), r"num_heads must have one entry a stage \(4\), got \(2, 2\)"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        tiny(**args)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(**TWO_STAGES)
    onnxruntime_agrees(model, images(48, 40))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(**TWO_STAGES)
    compiles_in_one_graph(model, images(64, 64))
