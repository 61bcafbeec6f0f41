"""Vision-RWKV: linear cost, any image, the authors' keys of every variant, the hidden head, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.mixers import SpatialMix
from visionbb.profiling import count_flops

TINY = dict(img_size=64, embed_dim=16, depth=3)
POST = dict(post_norm=True, key_norm=True, layer_scale=0.5, head_hidden=12)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("vrwkv_tiny", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "post_norm", "key_norm", "gain"), [
    ("vrwkv_tiny", False, False, None), ("vrwkv_small", True, False, 1.0), ("vrwkv_base", True, False, 1e-5),
    ("vrwkv_large", True, True, 1e-5),
])
def test_variants_differ_as_the_paper_says(name, post_norm, key_norm, gain):
    model = timm.create_model(name, device="meta")
    for i, block in enumerate(model.blocks):
        assert block.post_norm == post_norm
        assert isinstance(block.norm0, nn.LayerNorm) == (i == 0)
        assert isinstance(block.mixer.norm, nn.LayerNorm) == isinstance(block.mlp.norm, nn.LayerNorm) == key_norm
        assert block.ls1.layer_scale == block.ls2.layer_scale == gain
    assert len(model.blocks) == (24 if name == "vrwkv_large" else 12)


def test_norms_stand_before_the_mixers_or_behind_them():
    for post_norm in (False, True):
        block = tiny(post_norm=post_norm).blocks[1]
        x = torch.randn(2, 4, 4, 16)
        y = x
        for norm, mix in ((block.norm1, block.mixer), (block.norm2, block.mlp)):
            y = y + (norm(mix(y)) if post_norm else mix(norm(y)))
        torch.testing.assert_close(block(x), y)


def test_cost_grows_with_the_number_of_pixels():
    model = timm.create_model("vrwkv_tiny", device="meta")
    assert count_flops(model, 896).flops / count_flops(model, 448).flops == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("kwargs", [{}, POST])
def test_one_model_takes_any_image(kwargs):
    model = tiny(**kwargs)
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        assert {x.shape for x in maps} == {(2, 16, math.ceil(H / 16), math.ceil(W / 16))}
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)


def test_positions_are_resampled_without_antialiasing():
    model = tiny()
    table = model.pos_embed.weight.permute(0, 3, 1, 2)
    want = F.interpolate(table, (2, 3), mode="bicubic", antialias=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.pos_embed(torch.zeros(1, 2, 3, 16)), want)


def test_every_token_sees_the_whole_map_after_one_block():
    block = tiny().blocks[1]
    x = torch.randn(1, 7, 9, 16, requires_grad=True)
    block(x)[0, 6, 2].sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


def test_hidden_layer_of_the_head_stays():
    model = tiny(**POST)
    hidden = model.head.hidden.weight.clone()
    features = model.forward_features(images(64, 48))
    want = torch.tanh(model.head.hidden(features.mean((1, 2))))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), want)
    model.reset_classifier(9, "max")
    assert model(images(64, 48)).shape == (2, 9)
    assert torch.equal(model.head.hidden.weight, hidden)
    model.reset_classifier(0)
    assert model(images(64, 48)).shape == (2, 12) == (2, model.head_hidden_size)
    model.reset_classifier(9, "catavgmax")  # each of the poolings goes through the hidden layer
    pools = features.mean((1, 2)), features.amax((1, 2))
    want = torch.cat([model.head.hidden(pooled).tanh() for pooled in pools], -1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), want)
    assert model(images(64, 48)).shape == (2, 9)
    assert model.head_hidden_size == 24


@pytest.mark.parametrize("kwargs", [{}, POST])
def test_trains(kwargs):
    model = tiny(drop_path_rate=0.2, drop_rate=0.1, **kwargs).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_decays_bonuses_and_shares_are_kept_from_weight_decay():
    model = tiny()
    names = {key for key, _ in model.named_parameters() if key.split(".")[-1] in ("decay", "bonus", "weight")}
    kept = model.no_weight_decay()
    assert kept & names == {key for key in names if key.endswith(("decay", "bonus"))} | {"pos_embed.weight"}
    assert {f"{key}.mix_v" for key, m in model.named_modules() if isinstance(m, SpatialMix)} <= kept


def authors_checkpoint(dim: int, depth: int, size: int, gains: bool, key_norm: bool, hidden: int) -> dict:
    """Names and shapes of the authors' checkpoints, without numbers."""
    shapes = {"pos_embed": (1, (size // 16) ** 2, dim), "patch_embed.projection.weight": (dim, 3, 16, 16)}
    shapes |= {"patch_embed.projection.bias": (dim,), "ln1.weight": (dim,), "ln1.bias": (dim,)}
    for i in range(depth):
        for norm in ("ln0", "ln1", "ln2")[i > 0 :]:
            shapes |= {f"layers.{i}.{norm}.weight": (dim,), f"layers.{i}.{norm}.bias": (dim,)}
        if gains:
            shapes |= {f"layers.{i}.gamma1": (dim,), f"layers.{i}.gamma2": (dim,)}
        att, ffn = f"layers.{i}.att.", f"layers.{i}.ffn."
        shapes |= {att + "spatial_decay": (dim,), att + "spatial_first": (dim,)}
        shapes |= {f"{att}spatial_mix_{name}": (1, 1, dim) for name in "kvr"}
        shapes |= {f"{ffn}spatial_mix_{name}": (1, 1, dim) for name in "kr"}
        shapes |= {f"{att}{name}.weight": (dim, dim) for name in ("key", "value", "receptance", "output")}
        shapes |= {ffn + "key.weight": (4 * dim, dim), ffn + "value.weight": (dim, 4 * dim)}
        shapes[ffn + "receptance.weight"] = (dim, dim)
        if key_norm:
            shapes |= {f"{att}key_norm.{name}": (dim,) for name in ("weight", "bias")}
            shapes |= {f"{ffn}key_norm.{name}": (4 * dim,) for name in ("weight", "bias")}
    shapes = {f"backbone.{key}": shape for key, shape in shapes.items()}
    if hidden:
        shapes |= {"head.0.weight": (hidden, dim), "head.0.bias": (hidden,)}
    head = "head.2" if hidden else "head.fc"
    shapes |= {f"{head}.weight": (1000, hidden or dim), f"{head}.bias": (1000,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(("name", "args"), [
    ("vrwkv_tiny", (192, 12, 224, False, False, 0)), ("vrwkv_small", (384, 12, 224, True, False, 0)),
    ("vrwkv_base", (768, 12, 224, True, False, 0)), ("vrwkv_large", (1024, 24, 192, True, True, 3072)),
])
def test_authors_checkpoints_fit(name, args):
    """Strictly: no key missing, none left over."""
    model = timm.create_model(name, device="meta")
    model.load_state_dict({"state_dict": authors_checkpoint(*args)}, assign=True)


def test_positions_of_another_size_load_as_well():
    state = tiny(img_size=96).state_dict()
    model = tiny()
    model.load_state_dict(state)
    want = F.interpolate(state["pos_embed.weight"].permute(0, 3, 1, 2), (4, 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.pos_embed.weight, want)


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny(**POST)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    args = {**TINY, **POST, "num_classes": 5}
    again = timm.create_model("vrwkv_tiny", **args, checkpoint_path=tmp_path / "own.pth").eval()
    torch.testing.assert_close(again(images(64, 64)), model(images(64, 64)), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depth=1)
    onnxruntime_agrees(model, images(64, 48))


@pytest.mark.parametrize("kwargs", [{}, POST])
def test_scripts(kwargs):
    model = tiny(**kwargs)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images(64, 50)), model(images(64, 50)))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(depth=2)
    compiles_in_one_graph(model, images(64, 48))
