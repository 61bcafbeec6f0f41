"""LookupViT: both streams against the formulas, any image and any number of compressed tokens, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

from visionbb.models.lookupvit import VARIANTS
from visionbb.profiling import count_flops
from visionbb.reduction import reduce_tokens

TINY = dict(img_size=64, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2.0, compressed_size=3)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("lookupvit_small_patch16_7x7", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 and p.shape[0] > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


# ---- The formulas ---------------------------------------------------------------------------------------------------

def test_a_block_is_that_of_the_paper():
    """Written out for one image and one head after the other: gather, refine, hand back, and the small MLP."""
    block = tiny().double().blocks[1]
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(1, 2, 3, 16, dtype=torch.float64, generator=generator)
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64, generator=generator)
    got_z, got_x = block(z, x)

    Z, L = z[0].flatten(0, 1), x[0].flatten(0, 1)
    cross, refine, halves = block.cross, block.refine, (slice(0, 8), slice(8, 16))
    q = cross.q(block.norm_compressed(Z))
    k, v = cross.kv(block.norm_lookup(L)).chunk(2, -1)
    A = [(q[:, h] @ k[:, h].T / 8**0.5).softmax(-1) for h in halves]
    Z = Z + cross.proj(torch.cat([a @ v[:, h] for a, h in zip(A, halves, strict=True)], -1))

    q, k, v = refine.mixer.qkv(refine.norm1(Z)).chunk(3, -1)
    heads = [(q[:, h] @ k[:, h].T / 8**0.5).softmax(-1) @ v[:, h] for h in halves]
    Z = Z + refine.mixer.proj(torch.cat(heads, -1))
    Z = Z + refine.mlp.fc2(F.gelu(refine.mlp.fc1(refine.norm2(Z))))

    v = cross.v_back(block.norm_back(Z))
    L = L + cross.proj_back(torch.cat([a.T @ v[:, h] for a, h in zip(A, halves, strict=True)], -1))
    assert block.mlp.fc1.out_features == 8
    L = L + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm_mlp(L))))
    torch.testing.assert_close(got_z[0].flatten(0, 1), Z)
    torch.testing.assert_close(got_x[0].flatten(0, 1), L)


@pytest.mark.parametrize("size", [1, 5, (2, 7)])
def test_compressed_tokens_begin_as_the_map_resized(size):
    model = tiny(compressed_size=size)
    x = images(96, 56)
    z, lookup = model.forward_stem(x)
    rows, cols = (size, size) if isinstance(size, int) else size
    position = F.interpolate(model.pos_embed.weight.permute(0, 3, 1, 2), (12, 7), mode="bicubic", antialias=True)
    torch.testing.assert_close(lookup, (model.stem.proj(x) + position).permute(0, 2, 3, 1))
    want = F.interpolate(lookup.permute(0, 3, 1, 2), (rows, cols), mode="bilinear", antialias=True)
    torch.testing.assert_close(z, want.permute(0, 2, 3, 1))
    torch.testing.assert_close(tiny(compressed_size=(12, 7)).forward_stem(x)[0], lookup)


def test_the_head_reads_both_streams():
    model = tiny()
    x = images(64, 48)
    z, lookup = model.forward_features(x)
    assert (z.shape, lookup.shape) == ((2, 3, 3, 16), (2, 8, 6, 16))
    pooled = (z.mean((1, 2)) + lookup.mean((1, 2))) / 2
    torch.testing.assert_close(model(x), model.head.fc(pooled))
    torch.testing.assert_close(model.forward_head([z, lookup], pre_logits=True), pooled)

    model.reset_classifier(9, "catavgmax")
    assert model(x).shape == (2, 9)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32) == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), torch.cat((z.flatten(1, 2), lookup.flatten(1, 2)), 1), rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_cost_is_linear_in_the_number_of_patches(name):
    """As many multiply-adds as the formulas have, and no square of N."""
    model = timm.create_model(name, device="meta")
    C, side = model.num_features, VARIANTS[name]["compressed_size"]
    M = side**2
    for N in (14**2, 28**2):
        block = 15 * M * C**2 + 4 * N * C**2 + 3 * M * N * C + 2 * M**2 * C
        want = 12 * block + N * C * 3 * 16**2 + 1000 * C
        assert count_flops(model, round(16 * N**0.5)).flops == 2 * want
    assert sum(p.numel() for p in model.blocks[0].parameters() if p.ndim > 1) == 19 * C**2


# ---- Any image, any number of compressed tokens ---------------------------------------------------------------------

def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        (z, _), maps = model.forward_intermediates(images(H, W), norm=True)
        assert z.shape == (2, 3, 3, 16)
        assert {x.shape for x in maps} == {(2, 16, math.ceil(H / 8), math.ceil(W / 8))}
        torch.testing.assert_close(maps[-1], model.forward_features(images(H, W))[1].permute(0, 3, 1, 2))
        assert model(images(H, W)).isfinite().all()
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)


def test_the_number_of_compressed_tokens_may_change():
    """The same weights at another size are the network that was built at that size."""
    model, x = tiny(), images(64, 48)
    first = model(x)
    for size in (7, (2, 4)):
        built = tiny(compressed_size=size)
        model.set_compressed_size(size)
        torch.testing.assert_close(model(x), built(x), rtol=0, atol=0)
        assert not torch.allclose(model(x), first)
        built.load_state_dict(tiny().state_dict())  # strict
    model.set_compressed_size(3)
    torch.testing.assert_close(model(x), first, rtol=0, atol=0)


def test_training_draws_a_size_for_every_batch():
    model = tiny(train_sizes=(1, 2, (2, 4)))
    drawn = []
    model.compress.register_forward_hook(lambda module, args, out: drawn.append(tuple(out.shape[1:3])))
    for training in (True, False):
        drawn.clear()
        model.train(training)
        for _ in range(30):
            model(images(32, 32)[:1])
        assert set(drawn) == ({(1, 1), (2, 2), (2, 4)} if training else {(3, 3)})


def test_every_token_sees_the_whole_map_after_one_block():
    model = tiny(depth=1)
    x = torch.randn(1, 7, 9, 16, requires_grad=True)
    _, y = model.blocks[0](model.compress(x), x)
    y[0, 6, 2].sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


def test_feature_maps_are_whole_and_need_nothing_of_the_head():
    model = timm.create_model("lookupvit_tiny_patch16_5x5", features_only=True, **TINY | dict(depth=4)).eval()
    assert [x.shape for x in model(images(48, 40))] == [(2, 16, 6, 5)] * 3
    model.train()(images(48, 40))[-1].sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


# ---- Training and weights -------------------------------------------------------------------------------------------

def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 72)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
    assert model.no_weight_decay() == {"pos_embed.weight"}


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        model(images(64, 48)).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_layer_decay_goes_block_by_block():
    """The norms of both streams go with the head."""
    groups = param_groups_layer_decay(tiny(), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_a_checkpoint_of_another_size_loads_with_resampled_positions(tmp_path):
    state = tiny(img_size=96).state_dict()
    torch.save({"model": state}, tmp_path / "own.pth")
    model = timm.create_model(
        "lookupvit_small_patch16_7x7", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth"
    ).eval()
    want = F.interpolate(state["pos_embed.weight"].permute(0, 3, 1, 2), (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed.weight.permute(0, 3, 1, 2), want)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(images(64, 64)), model(images(64, 64)), rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"compressed_size must be at least 1 a side, got 0"):
        tiny(compressed_size=0)
    with pytest.raises(ValueError, match=r"compressed_size must be at least 1 a side, got \(2, -1\)"):
        tiny().set_compressed_size((2, -1))
    with pytest.raises(ValueError, match=r"train_sizes must be at least 1 a side, got 0"):
        tiny(train_sizes=(3, 0))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 16 and 3"):
        tiny(num_heads=3)
    with pytest.raises(TypeError, match="LookupViT cannot be reduced: its forward_features is not that of Columnar"):
        reduce_tokens(tiny(), "tome", r=2)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    onnxruntime_agrees(tiny(), images(97, 131))


def test_scripts():
    model = tiny()
    torch.testing.assert_close(torch.jit.script(model)(images(64, 50)), model(images(64, 50)))


def test_compiles_in_one_graph(compiles_in_one_graph):
    compiles_in_one_graph(tiny(), images(97, 131))
