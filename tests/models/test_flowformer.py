"""Flowformer: what it is made of, any image, the authors' checkpoint, export."""
from __future__ import annotations

import math

import timm
import torch
from torch import nn

from visionbb.models import flowformer

TINY = dict(dims=(12, 24, 24, 36), depths=(1, 2, 1, 1), mlp_ratio=2.0, pos_embed_size=(8, 8))


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("flowformer_19l", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def test_nineteen_layers_of_twelve_heads_with_gains_on_the_mlp_alone():
    blocks = [block for stage in timm.create_model("flowformer_19l").stages for block in stage.blocks]
    assert [block.mixer.num_heads for block in blocks] == [12] * 19
    assert {block.mixer.key_weight for block in blocks} == {"flow"}
    assert all(block.ls1.gamma is None for block in blocks)
    assert all((block.ls2.gamma == 1e-5).all() for block in blocks)


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(32, 32))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(32, 32)), first, rtol=0, atol=0)


def test_images_are_padded_to_whole_patches():
    model, x = tiny(), images(30, 37)
    torch.testing.assert_close(model(x), model(nn.functional.pad(x, (0, 3, 0, 2))))


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_authors_checkpoint_has_counters_and_another_size():
    """The counters that the authors' own loader leaves out, and positions of another resolution."""
    model = tiny()
    learned = torch.randn(1, 36, 12)
    kept = flowformer.checkpoint_filter_fn({"model": {
        "pos_embed": learned, "blocks.1.0.attn.total_ops": torch.zeros(1), "total_params": torch.zeros(1),
    }}, model)
    assert {key: value.shape for key, value in kept.items()} == {"stem.pos_embed.weight": (1, 8, 8, 12)}
    same = flowformer.checkpoint_filter_fn({"pos_embed": torch.arange(64.0)[None, :, None].expand(1, 64, 12)}, model)
    torch.testing.assert_close(same["stem.pos_embed.weight"][0, :, :, 3], torch.arange(64.0).view(8, 8))


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model_ema": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("flowformer_19l", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    torch.testing.assert_close(again(images(64, 64)), model(images(64, 64)), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny()
    onnxruntime_agrees(model, images(64, 56))


def test_compiles_in_one_graph():
    model, x = tiny(), images(64, 64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
