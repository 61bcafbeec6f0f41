"""MILA: pure linear attention, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import LinearAttention, SoftmaxAttention
from visionbb.models.mila import MambaMixer
from visionbb.profiling import count_flops

TWO_STAGES = dict(depths=(1, 1), num_heads=(1, 2))  # where a graph of all four costs seconds
TINY = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratio=2.0)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("mila_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def test_all_attention_is_linear_and_so_is_the_cost():
    model = timm.create_model("mila_tiny", device="meta")
    assert sum(isinstance(m, LinearAttention) for m in model.modules()) == sum((2, 4, 8, 4))
    assert not any(isinstance(m, SoftmaxAttention) for m in model.modules())
    assert count_flops(model, 896).flops / count_flops(model, 448).flops == pytest.approx(4, rel=1e-3)


def test_mixer_is_the_formula_of_the_paper():
    """As a sum over all pairs of tokens, with the rotary embedding as complex numbers over the whole width."""
    torch.manual_seed(0)
    H, W, C, heads = 3, 5, 16, 2
    mixer = MambaMixer(C, heads).double()
    x = torch.randn(1, H, W, C, dtype=torch.float64)
    u = mixer.dwc(mixer.in_proj(x))
    u = u * u.sigmoid()
    q, k = (nn.functional.elu(t) + 1 for t in mixer.attn.qkv(u).chunk(2, -1))
    theta = 10000.0 ** (-torch.arange(C // 4, dtype=torch.float64) / (C // 4))
    rows, cols = torch.arange(H, dtype=torch.float64), torch.arange(W, dtype=torch.float64)
    angle = torch.cat((
        (rows[:, None, None] * theta).expand(H, W, -1), (cols[None, :, None] * theta).expand(H, W, -1)
    ), -1)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(t):
        return torch.view_as_real(torch.view_as_complex(t.reshape(1, H, W, -1, 2)) * turn).flatten(3)

    def by_heads(t):
        return t.reshape(H * W, heads, C // heads).transpose(0, 1)

    numerator = by_heads(turned(q)) @ by_heads(turned(k)).transpose(1, 2)
    denominator = (by_heads(q) @ by_heads(k).transpose(1, 2)).sum(-1, keepdim=True)
    y = (numerator / denominator @ by_heads(u)).transpose(0, 1).reshape(x.shape) + mixer.attn.local(u)
    gate = mixer.act_proj(x)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y * gate * gate.sigmoid()), rtol=1e-5, atol=1e-5)


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("mila_tiny", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(**TWO_STAGES)
    onnxruntime_agrees(model, images(64, 56))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(**TWO_STAGES)
    compiles_in_one_graph(model, images(64, 64))


def test_errors():
    with pytest.raises(ValueError, match=r"num_heads must have one entry a stage \(4\), got \(1, 2\)"):
        timm.create_model("mila_tiny", **{**TINY, "num_heads": (1, 2)})
