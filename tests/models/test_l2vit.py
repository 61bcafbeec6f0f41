"""L2ViT: blocks by turns, windows by tag, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from visionbb.mixers import LinearAttention, WindowAttention
from visionbb.models.l2vit import LocalConcentration

TWO_STAGES = dict(depths=(2, 2), num_heads=(1, 2))  # where a graph of all four costs seconds
TINY = dict(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=3, mlp_ratio=2.0)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("l2vit_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def test_windows_and_linear_attention_by_turns():
    for stage in timm.create_model("l2vit_small", device="meta").stages:
        kinds = [(type(block.mixer), isinstance(block.cpe2, LocalConcentration)) for block in stage.blocks]
        assert kinds == [(WindowAttention, False), (LinearAttention, True)] * (len(kinds) // 2)


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [("l2vit_base.in22k_in1k", {}, 7), ("l2vit_base.in22k_in1k_384", {}, 12),
     ("l2vit_base.in22k_in1k_384", dict(window_size=8), 8)],
)
def test_windows_are_those_of_the_tag(name, kwargs, size):
    model = timm.create_model(name, device="meta", **kwargs)
    windows = {(m.rows, m.cols) for m in model.modules() if isinstance(m, WindowAttention)}
    assert windows == {(size, size)}


def test_temperature_starts_as_softmax_attention_scales_and_decays():
    model = timm.create_model("l2vit_tiny")
    temperatures = [m.temperature for m in model.modules() if isinstance(m, LinearAttention)]
    assert len(temperatures) == 6
    for t in temperatures:
        torch.testing.assert_close(t, torch.full_like(t, 32**-0.5))
    decayed = param_groups_weight_decay(model, 0.05, model.no_weight_decay())[1]["params"]
    assert all(any(t is p for p in decayed) for t in temperatures)


def test_temperature_is_a_gain_of_its_head_alone():
    torch.manual_seed(0)
    mixer = LinearAttention(8, 2, "relu", normalizer="clamp", eps=1.0, temperature=True, out_proj=False)
    x = torch.randn(2, 5, 4, 8)
    before = mixer(x)
    with torch.no_grad():
        mixer.temperature[1] *= 3
    torch.testing.assert_close(mixer(x), torch.cat((before[..., :4], 3 * before[..., 4:]), -1))


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def test_images_are_extended_to_whole_patches_by_zeros():
    model = tiny()
    padded = nn.functional.pad(images(61, 90), (0, 2, 0, 3))
    torch.testing.assert_close(model(images(61, 90)), model(padded))


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
    again = timm.create_model("l2vit_tiny", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(**TWO_STAGES)
    onnxruntime_agrees(model, images(61, 56))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(**TWO_STAGES)
    compiles_in_one_graph(model, images(61, 64))


def test_errors():
    with pytest.raises(ValueError, match=r"num_heads must have one entry a stage \(4\), got \(1, 2\)"):
        timm.create_model("l2vit_tiny", **{**TINY, "num_heads": (1, 2)})
