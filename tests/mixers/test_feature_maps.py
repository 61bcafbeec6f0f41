"""Learned feature maps, against what their papers write with the N x N weights of all pairs of tokens."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.mixers import LinearAttention
from visionbb.mixers.feature_maps import Focused, Hedgehog, Polar, create_feature_map

H, W, HEADS, D = 3, 4, 2, 6
DIM = HEADS * D


def mixer(**kwargs) -> LinearAttention:
    """Bare attention in float64, whose parameters all matter."""
    torch.manual_seed(0)
    module = LinearAttention(DIM, HEADS, **kwargs).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module


def parts(module, x, key_pos=0.0):
    """q, k, v, ... (B, N, HEADS, D) of a map; positions are added to the keys."""
    q, k, *rest = module.qkv(x.flatten(1, 2)).chunk(module.parts, -1)
    return [t.unflatten(-1, (HEADS, D)) for t in (q, k + key_pos, *rest)]


def attention(q, k, v):
    """Rows of weights q_i . k_j divided by their mean plus 1e-6, over N: what all these papers do with features."""
    scores = torch.einsum("bnhf,bmhf->bhnm", q, k)
    weights = scores / k.shape[1] / (scores.mean(-1, keepdim=True) + 1e-6)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def images(seed=0):
    return torch.randn(2, H, W, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def local(module, v):
    """A 5 x 5 convolution whose kernels all heads share, (B, N, HEADS, D)."""
    maps = v.unflatten(1, (H, W)).permute(0, 3, 4, 1, 2)  # (B, HEADS, D, H, W)
    y = F.conv2d(maps.flatten(0, 1), module.local.weight, module.local.bias, padding=2, groups=D)
    return y.unflatten(0, (-1, HEADS)).permute(0, 3, 4, 1, 2).flatten(1, 2)


def test_hedgehog_as_the_paper_writes_it():
    module, x = mixer(feature_map="hedgehog"), images()
    q, k, v = parts(module, x)

    def features(t, weight):
        t = torch.stack([t[:, :, head] @ weight[head] for head in range(HEADS)], 2)
        return torch.cat((t.exp() / t.exp().sum(-1, keepdim=True), (-t).exp() / (-t).exp().sum(-1, keepdim=True)), -1)

    y = attention(features(q, module.feature_map.q_weight), features(k, module.feature_map.k_weight), v)
    torch.testing.assert_close(module(x), module.proj(y.flatten(2)).unflatten(1, (H, W)))


def test_hedgehog_starts_as_the_identity():
    q, k = torch.randn(2, 1, 5, 4, HEADS, D)
    q_features, k_features = Hedgehog(HEADS, D)(q, k)
    torch.testing.assert_close(q_features, torch.cat((q.softmax(-1), (-q).softmax(-1)), -1))
    torch.testing.assert_close(k_features, torch.cat((k.softmax(-1), (-k).softmax(-1)), -1))


def test_focused_as_the_paper_writes_it():
    """f(x) = |x| x^3 / |x^3|: norms are over the channels of all heads, positions are added to the raw keys."""
    module, x = mixer(feature_map="focused", local_kernel=5, share_local=True, key_pos_size=(H, W)), images()
    q, k, v = parts(module, x, module.key_pos.flatten(1, 2))

    def focus(t):
        t = ((t.relu() + 1e-6) / F.softplus(module.feature_map.scale)).flatten(2)
        t = t.norm(dim=-1, keepdim=True) * t**3 / (t**3).norm(dim=-1, keepdim=True)
        return t.unflatten(-1, (HEADS, D))

    y = attention(focus(q), focus(k), v) + local(module, v)
    torch.testing.assert_close(module(x), module.proj(y.flatten(2)).unflatten(1, (H, W)))


def test_polar_as_the_paper_writes_it():
    """Weights of equal signs for the first half of a head's values, of opposite signs for the second."""
    module, x = mixer(
        feature_map="polar", local_kernel=5, share_local=True, gate="mul", key_pos_size=(H, W)
    ), images()
    q, k, v, gate = parts(module, x, module.key_pos.flatten(1, 2))
    maps = module.feature_map
    q, k = (t / F.softplus(maps.scale) for t in (q, k))
    power = 1 + 4 * maps.power.sigmoid()
    q_pos, q_neg, k_pos, k_neg = (t.relu() ** power for t in (q, -q, k, -k))

    def pairs(a, b):
        return torch.einsum("bnhf,bmhf->bhnm", a, b)

    halves = []
    for scores, values in (
        (pairs(q_pos, k_pos) + pairs(q_neg, k_neg), v[..., : D // 2]),
        (pairs(q_pos, k_neg) + pairs(q_neg, k_pos), v[..., D // 2 :]),
    ):
        weights = scores / (H * W) / (scores.mean(-1, keepdim=True) + 1e-6)
        halves.append(torch.einsum("bhnm,bmhd->bnhd", weights, values))
    y = (torch.cat(halves, -1) + local(module, v)) * gate
    torch.testing.assert_close(module(x), module.proj(y.flatten(2)).unflatten(1, (H, W)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999), exponent=st.integers(-30, 30), name=st.sampled_from(["focused", "polar", "hedgehog"]),
    zeros=st.booleans(),
)
def test_features_and_gradients_stay_finite(seed, exponent, name, zeros):
    """Of any length that a query may have, in half precision too, whose range powers of 3 to 5 leave."""
    x = torch.randn(2, 1, 2, 3, HEADS, D, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (exponent / 4)
    if zeros:
        x[:, :, 0] = 0
    for dtype in (torch.float16, torch.bfloat16):
        module = create_feature_map(name, HEADS, D).to(dtype)
        q, k = x.to(dtype).requires_grad_()
        features = module(q, k)
        assert all(f.isfinite().all() and (f >= 0).all() for f in features)
    grads = torch.autograd.grad(sum(f.float().sum() for f in features), [q, k, *module.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_focused_keeps_lengths_and_sharpens_directions():
    x = torch.rand(1, 2, 3, HEADS, D)
    features, _ = Focused(HEADS, D)(x, x)
    lengths = (x.relu() / F.softplus(torch.zeros(()))).norm(2, dim=(-2, -1))
    torch.testing.assert_close(features.norm(2, dim=(-2, -1)), lengths, rtol=1e-4, atol=0)
    assert (features.flatten(-2).amax(-1) / lengths > x.flatten(-2).amax(-1) / x.norm(2, dim=(-2, -1))).all()


def test_polar_halves_the_values():
    with pytest.raises(ValueError, match=r"head_dim must be even for feature_map 'polar', .* got 5"):
        Polar(2, 5)


# ---- Positions of keys ----------------------------------------------------------------------------------------------

def test_key_positions_are_resampled_to_the_map():
    """A table that rises along columns does so on any map."""
    module = mixer(feature_map="relu", key_pos_size=(3, 8))
    with torch.no_grad():
        module.key_pos.copy_(torch.linspace(0, 1, 8, dtype=torch.float64)[:, None].expand(3, 8, DIM))
    k = module.keys(torch.zeros(2, 6, 16, DIM, dtype=torch.float64), 6, 16)
    assert k.shape == (2, 6, 16, DIM)
    assert (k.diff(dim=2) > 0).all()
    torch.testing.assert_close(k, k[:1, :1, :, :1].expand_as(k))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_prefix_tokens_have_no_position(prefix):
    module, k = mixer(feature_map="relu", key_pos_size=(H, W)), images().flatten(1, 2)
    tokens = torch.cat((torch.ones(2, prefix, DIM, dtype=torch.float64), k), 1).unsqueeze(1)
    got = module.keys(tokens, H, W)[:, 0]
    torch.testing.assert_close(got[:, :prefix], tokens[:, 0, :prefix], rtol=0, atol=0)
    torch.testing.assert_close(got[:, prefix:], k + module.key_pos.flatten(1, 2))


def test_key_positions_start_without_effect_and_do_not_decay():
    module = LinearAttention(DIM, HEADS, key_pos_size=(H, W))
    assert module.key_pos.count_nonzero() == 0
    assert module.no_weight_decay() == {"key_pos"}
