"""RAVLT, MAViT and NaLaFormer: the published sizes, the authors' keys, any image, what each variant is made of."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import LinearAttention, SoftmaxAttention
from visionbb.models import ravlt
from visionbb.profiling import count_flops

# Parameters (millions) and GMACs at 224 of the authors' code; for NaLaFormer parameters alone are known.
PUBLISHED = {
    "ravlt_tiny": (14.898, 2.63), "ravlt_small": (25.591, 4.90), "ravlt_base": (48.241, 10.62),
    "ravlt_large": (95.242, 17.26), "mavit_tiny": (16.449, 2.65), "mavit_small": (27.143, 4.93),
    "mavit_base": (49.793, 10.64), "mavit_large": (97.766, 17.30), "nalaformer_xtiny": (6.14, None),
    "nalaformer_tiny": (15.91, None), "nalaformer_small": (25.65, None), "nalaformer_base": (52.00, None),
    "nalaformer_large": (95.43, None),
}
TINY = dict(dims=(8, 16, 16, 24), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 3), mlp_ratio=2.0, head_hidden=20)
KINDS = ["ravlt_tiny", "mavit_tiny", "nalaformer_tiny"]


def tiny(name: str, **kwargs) -> nn.Module:
    """The variant as it is but narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def test_every_variant_is_checked():
    assert set(PUBLISHED) == set(ravlt.VARIANTS) - {"ravlt_digits"}  # nothing is published about it


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published(name):
    params, gmacs = PUBLISHED[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.0051)
    if gmacs is not None:
        assert count_flops(model, 224).flops / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", KINDS)
def test_first_half_is_linear_and_second_softmax(name):
    model = timm.create_model(name, device="meta")
    kinds = [{type(block.mixer) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{LinearAttention}, {LinearAttention}, {SoftmaxAttention}, {SoftmaxAttention}]
    all_linear = timm.create_model(name, linear_stages=4, device="meta")
    assert not any(isinstance(m, SoftmaxAttention) for m in all_linear.modules())


@pytest.mark.parametrize("name", KINDS)
def test_one_model_takes_any_image(name):
    model = tiny(name)
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_trains(name):
    model = tiny(name, drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", KINDS)
def test_native_checkpoints_come_back_as_they_are(name, tmp_path):
    model = tiny(name)
    torch.save({"model_ema": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model(name, **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_detectors_norms_are_left_out():
    model = tiny("ravlt_tiny")
    kept = ravlt.checkpoint_filter_fn(
        {"layers.0.blocks.0.gamma_1": torch.ones(1, 8, 1, 1), "extra_norms.0.norm.weight": torch.ones(8)}, model
    )
    assert {key: value.shape for key, value in kept.items()} == {"stages.0.blocks.0.ls1.gamma": (8,)}


@pytest.mark.parametrize("name", KINDS)
def test_head_keeps_its_projection_without_a_classifier(name):
    model = tiny(name)
    features = model.forward_features(images(64, 64))
    hidden = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model.forward_head(features), hidden)
    assert hidden.shape == (2, model.head_hidden_size) == (2, 20)
    model.reset_classifier(3, "max")
    assert model.forward_head(features).shape == (2, 3)


def test_pruning_takes_the_projection_along():
    model = tiny("ravlt_tiny")
    taps = model.forward_intermediates(images(64, 64), indices=[1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert not any(key.startswith("head.") for key in model.state_dict())
    torch.testing.assert_close(model(images(64, 64)).permute(0, 3, 1, 2), taps[0])


@pytest.mark.parametrize("name", KINDS)
def test_onnxruntime_agrees_on_any_batch(name, onnxruntime_agrees):
    model = tiny(name)
    onnxruntime_agrees(model, images(64, 56))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny("ravlt_tiny")
    compiles_in_one_graph(model, images(64, 64))


def test_initial_gains_and_convolutions():
    gains = [stage.blocks[0].ls1.gamma.unique().item() for stage in timm.create_model("ravlt_base").stages]
    assert gains == pytest.approx([1, 1, 1e-6, 1e-6])
    model = timm.create_model("nalaformer_xtiny")
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.numel() > 1000:
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(attention="rela"), "attention must be one of rala, mala, nala, got 'rela'"),
        (dict(num_heads=(1, 2)), "one entry a stage"),
        (dict(layer_scale=(1.0, 1.0)), "one entry a stage"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("ravlt_tiny", **{**TINY, **kwargs})
