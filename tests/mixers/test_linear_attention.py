"""The frame of global attention, its linear and its softmax form, and the feature maps."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.kernels import Rotary, rotary2d, use
from visionbb.mixers import LinearAttention, SoftmaxAttention
from visionbb.mixers.feature_maps import FEATURE_MAPS, create_feature_map
from visionbb.mixers.linear_attention import global_query_weights

FRAME = dict(rotary="head", local_kernel=5, gate="mul")
# Papers as rows of arguments.
PAPERS = {
    "rala": dict(feature_map="elu", key_weight="global_query", **FRAME),
    "mala": dict(feature_map="elu", normalizer="additive", **FRAME),
    "nala": dict(feature_map="norm_aware", **FRAME | dict(gate="silu", out_norm=True)),
    "mila": dict(feature_map="elu", rotary="map", local_kernel=3, value_proj=False, out_proj=False),
    "l2vit": dict(feature_map="relu", normalizer="clamp", eps=100.0),
    "shared": dict(feature_map="exp", local_kernel=3, share_local=True),
    "flow": dict(feature_map="sigmoid", key_weight="flow", normalizer="none"),
    "flow in a frame": dict(feature_map="sigmoid", key_weight="flow", normalizer="none", **FRAME),
    "hedgehog": dict(feature_map="hedgehog"),
    "flatten": dict(feature_map="focused", local_kernel=5, share_local=True, key_pos_size=(3, 4)),
    "pola": dict(feature_map="polar", local_kernel=5, share_local=True, gate="mul", key_pos_size=(3, 4)),
}


def mixer(paper, dim=16, num_heads=2, **kwargs):
    torch.manual_seed(0)
    return LinearAttention(dim, num_heads, **PAPERS[paper], **kwargs).eval()


def parts(module, x):
    """q, k, v, g of a map, each (B, N, heads, head_dim)."""
    return module.qkv(x).flatten(1, 2).unflatten(-1, (-1, module.num_heads, module.head_dim)).unbind(2)


def finished(module, x, y, v, gate):
    """What the frame does with attention y (B, N, heads, head_dim)."""
    conv = F.conv2d(v.flatten(2).transpose(1, 2).unflatten(2, x.shape[1:3]), module.local.weight, module.local.bias,
                    padding=2, groups=x.shape[-1])
    y = y.flatten(2) + conv.flatten(2).transpose(1, 2)
    if module.norm is not None:
        y = F.layer_norm(y, y.shape[-1:], module.norm.weight, module.norm.bias, 1e-5)
    return module.proj(y * gate.flatten(2)).unflatten(1, x.shape[1:3])


def turned(x, H, W):
    return rotary2d(x.unflatten(1, (H, W)), Rotary.closed(x.shape[-1])).flatten(1, 2)


def test_rala_as_the_paper_writes_it():
    """Keys weighted by N alpha, sums over keys then divided by N; the denominator knows no positions."""
    module, x = mixer("rala").double(), torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v, gate = parts(module, x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    alpha = (torch.einsum("bhd,bnhd->bnh", q.mean(1), k) * 8**-0.5).softmax(1)
    k = k * alpha[..., None] * 12
    kv = torch.einsum("bnhd,bnhe->bhde", turned(k, 3, 4), v) / 12
    y = torch.einsum("bnhd,bhde->bnhe", turned(q, 3, 4), kv)
    y = y / (torch.einsum("bnhd,bhd->bnh", q, k.mean(1)) + 1e-6)[..., None]
    torch.testing.assert_close(module(x), finished(module, x, y, v, gate))


def test_mala_as_the_paper_writes_it():
    module, x = mixer("mala").double(), torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v, gate = parts(module, x)
    q, k = (F.elu(q) + 1) * 8**-0.5, F.elu(k) + 1
    total = torch.einsum("bnhd,bhd->bnh", q, k.mean(1))[..., None]
    kv = torch.einsum("bnhd,bnhe->bhde", turned(k, 3, 4), v) / 12
    y = torch.einsum("bnhd,bhde->bnhe", turned(q, 3, 4), kv)
    y = y * (1 + 1 / (total + 1e-6)) - total * v.mean(1, keepdim=True)
    torch.testing.assert_close(module(x), finished(module, x, y, v, gate))


def test_nala_as_the_paper_writes_it():
    module, x = mixer("nala").double(), torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v, gate = parts(module, x)
    length = q.norm(dim=-1, keepdim=True)
    q = [(s * q / length).relu() ** (3 * (0.5 + length.tanh())) for s in (1, -1)]
    k = [(s * k**3).relu() for s in (1, -1)]
    total = sum(torch.einsum("bnhd,bhd->bnh", a, b.mean(1)) for a, b in zip(q, k))
    scores = sum(torch.einsum("bnhd,bmhd->bhnm", turned(a, 3, 4), turned(b, 3, 4)) for a, b in zip(q, k))
    y = torch.einsum("bhnm,bmhe->bnhe", scores, v) / 12 / (total + 1e-6)[..., None]
    torch.testing.assert_close(module(x), finished(module, x, y, v, F.silu(gate)))


@pytest.mark.parametrize("shift", [0, -12])  # sigmoid(-12) = 6e-6: 1e-6 counts
def test_flow_as_the_paper_writes_it(shift):
    """Conservation and competition written with the N x N flows of all pairs, 1e-6 where the authors' code has it."""
    module, x = mixer("flow").double(), torch.randn(2, 3, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        module.qkv.bias[:32] += shift
    q, k, v = parts(module, x)
    q, k = (t.sigmoid().transpose(1, 2) for t in (q, k))
    e = 1e-6

    def flow(a, b, share=1.0):
        """(a_i + e) . (sum_j share_j b_j + e) + e, as a sum over j."""
        pairs = torch.einsum("bhnd,bhmd->bhnm", a + e, b) * share
        return pairs.sum(-1) + e * (a + e).sum(-1) + e

    incoming, outgoing = flow(q, k), flow(k, q)
    query = flow(q, k, 1 / outgoing[:, :, None])
    key = flow(k, q, 1 / incoming[:, :, None]).clamp(-1, 1)
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k) / incoming[..., None] * query.sigmoid()[..., None]
    y = torch.einsum("bhnm,bhm,bmhd->bnhd", weights, key.softmax(-1) * 12, v)
    torch.testing.assert_close(module(x), module.proj(y.flatten(2)).unflatten(1, (3, 4)))


def test_softmax_twin():
    torch.manual_seed(0)
    module = SoftmaxAttention(16, 2, **FRAME).double()
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v, gate = parts(module, x)
    scores = torch.einsum("bnhd,bmhd->bhnm", turned(q, 3, 4), turned(k, 3, 4)) * 8**-0.5
    y = torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1), v)
    torch.testing.assert_close(module(x), finished(module, x, y, v, gate))


def test_values_and_result_may_stay_unprojected():
    module = mixer("mila")
    assert set(dict(module.named_parameters())) == {"qkv.weight", "qkv.bias", "local.weight", "local.bias"}
    assert module.qkv.out_features == 2 * 16
    nn.init.zeros_(module.qkv.weight)  # all weights alike: the mean of x, and its convolution
    x = torch.randn(1, 4, 5, 16)
    with torch.no_grad():
        y = module(x) - module.local(x)
    rows = torch.arange(4)
    # Equal keys that turn: the heads of the first half know rows alone, so that their result is constant along a row.
    torch.testing.assert_close(y[..., :8], y[:, :, :1, :8].expand(-1, -1, 5, -1))
    assert not torch.allclose(y[:, rows[0], :, 8:], y[:, rows[0], :1, 8:].expand(-1, 5, -1))


def test_flow_shares_the_attention_and_not_what_the_frame_adds():
    torch.manual_seed(0)
    bare = mixer("flow", out_proj=False)
    framed = mixer("flow", out_proj=False, local_kernel=3, gate="mul")
    framed.load_state_dict(bare.state_dict() | {"qkv.weight": torch.cat((bare.qkv.weight, bare.qkv.weight[:16])),
                                                "qkv.bias": torch.cat((bare.qkv.bias, bare.qkv.bias[:16]))},
                           strict=False)
    x = torch.randn(2, 5, 3, 16)
    q, _, v = bare.qkv(x).chunk(3, -1)
    torch.testing.assert_close(framed(x), (bare(x) + framed.local(v)) * q)


@pytest.mark.parametrize("paper", PAPERS)
def test_any_map_any_path_and_gradients(paper):
    for H, W in ((1, 1), (5, 3)):
        module = mixer(paper)
        x = torch.randn(2, H, W, 16, requires_grad=True)
        y = module(x)
        with use("reference"):
            torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        assert y.shape == x.shape
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("paper", PAPERS)
def test_scripts(paper):
    module, x = mixer(paper), torch.randn(2, 4, 3, 16)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize("paper", PAPERS)
def test_autocast(paper):
    module, x = mixer(paper), torch.randn(2, 6, 5, 16)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.1 * exact.abs().max()


def test_cubes_of_large_keys_survive_half_precision():
    """NaLaFormer: |k| = 100 is a float16 number and its cube is none."""
    module, x = mixer("nala").half(), torch.randn(1, 6, 6, 16).half()
    with torch.no_grad():
        module.qkv.bias[16:32] = 100
        assert module(x).isfinite().all()


def test_a_query_of_zeros_has_no_features():
    q = torch.zeros(1, 2, 2, 1, 4, requires_grad=True)
    features, _ = create_feature_map("norm_aware", 1, 4)(q, torch.ones(1, 2, 2, 1, 4))
    assert features.count_nonzero() == 0
    assert torch.autograd.grad(features.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_not_negative(name):
    features = create_feature_map(name, 2, 8)(*torch.randn(2, 2, 3, 4, 2, 8))
    assert all((f >= 0).all() and f.any() for f in features)


def test_global_query_weights_are_a_softmax_over_the_map():
    q, k = torch.randn(2, 2, 3, 4, 2, 8).half()
    weights = global_query_weights(q, k, 0.5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2, 2))
    logits = torch.einsum("bhd,byxhd->byxh", q.float().mean((1, 2)), k.float()) * 0.5
    torch.testing.assert_close(weights.flatten(1, 2), logits.flatten(1, 2).softmax(1))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((16, 3), {}, "dim must be a multiple of num_heads, got 16 and 3"),
        ((16, 2), dict(rotary="axial"), "rotary must be one of .*, got 'axial'"),
        ((12, 2), dict(rotary="head"), "multiple of 4"),
        ((16, 2), dict(gate="sigmoid"), "gate must be one of .*, got 'sigmoid'"),
        ((16, 2), dict(feature_map="cosine"), "feature_map must be one of .*, got 'cosine'"),
        ((16, 2), dict(normalizer="softmax"), "normalizer must be one of .*, got 'softmax'"),
        ((16, 2), dict(key_weight="local"), "key_weight must be one of .*, got 'local'"),
        ((16, 2), dict(key_weight="flow"), "normalizer must be 'none' with key_weight 'flow', got 'div'"),
    ],
)
def test_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(*args, **kwargs)
