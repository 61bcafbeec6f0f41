"""VSSD: no scan, softmax attention last, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import NonCausalSSD, SoftmaxAttention
from visionbb.profiling import count_flops

TWO_STAGES = dict(depths=(1, 1), num_heads=(1, 2))  # where a graph of all four costs seconds
TINY = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), d_state=6, mlp_ratio=2.0)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("vssd_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-1, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def test_all_stages_but_the_last_are_state_spaces():
    model = timm.create_model("vssd_tiny", device="meta")
    kinds = [{type(block.mixer) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{NonCausalSSD}] * 3 + [{SoftmaxAttention}]
    linear = timm.create_model("vssd_tiny", device="meta", attention_stages=0)
    assert count_flops(linear, 896).flops / count_flops(linear, 448).flops == pytest.approx(4, rel=1e-3)


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
    again = timm.create_model("vssd_tiny", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
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
        timm.create_model("vssd_tiny", **{**TINY, "num_heads": (1, 2)})
