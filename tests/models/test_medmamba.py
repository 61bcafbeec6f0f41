"""MedMamba: halves of the channels, any image, exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.models.medmamba import ConvScanBlock
from visionbb.profiling import count_flops

TINY = dict(embed_dim=8, depths=(1, 2, 1, 1), d_state=4)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("medmamba_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def test_convolved_and_scanned_channels_take_turns():
    block = tiny().stages[0].blocks[0]
    x = torch.randn(1, 9, 8, 8, requires_grad=True)
    y = block(x) - x
    reach = []
    for channel in (2, 3):  # the second of each half
        (grad,) = torch.autograd.grad(y[0, 4, 4, channel], x, retain_graph=True)
        half = slice(4) if channel == 2 else slice(4, 8)
        assert not bool(grad[..., 4:].any() if channel == 2 else grad[..., :4].any())
        reach.append(int((grad[..., half].abs().sum(-1) > 0).sum()))
    assert reach[0] <= 25  # two 3x3 convolutions
    assert reach[1] == 72  # the whole map


def test_drop_path_leaves_the_convolutions_alone():
    torch.manual_seed(0)
    block = ConvScanBlock(8, 2, drop_path=0.999, proj_drop=0.0).train()
    x = torch.randn(4, 5, 5, 8)
    y = block(x) - x
    assert bool((y[..., ::2] != 0).any())
    assert bool((y[..., 1::2] == 0).all())


def test_cost_grows_with_the_number_of_pixels():
    model = timm.create_model("medmamba_tiny", device="meta")
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
    again = timm.create_model("medmamba_tiny", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(depths=(1, 1))
    compiles_in_one_graph(model, images(64, 64))


def test_errors():
    with pytest.raises(ValueError, match="embed_dim must be even, got 9"):
        timm.create_model("medmamba_tiny", embed_dim=9)
