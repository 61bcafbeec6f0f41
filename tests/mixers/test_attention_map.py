"""The weights of all pairs of tokens that an attention sums its values with."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.mixers import LinearAttention, SoftmaxAttention

LINEAR = {
    "elu": {},
    "relu": dict(feature_map="relu"),
    "hedgehog": dict(feature_map="hedgehog"),
    "focused": dict(feature_map="focused", key_pos_size=(3, 4)),
    "global query": dict(key_weight="global_query"),
    "flow": dict(feature_map="sigmoid", key_weight="flow", normalizer="none"),
    "additive": dict(normalizer="additive"),
    "clamp": dict(feature_map="relu", normalizer="clamp", eps=1e-3, temperature=True),
    "none": dict(feature_map="exp", normalizer="none"),
}
SUM_TO_ONE = ("elu", "hedgehog", "global query", "additive")  # others may vanish beside eps


def mixer(kind: str, dim: int = 16, num_heads: int = 2, **kwargs) -> SoftmaxAttention | LinearAttention:
    torch.manual_seed(0)
    if kind == "softmax":
        module = SoftmaxAttention(dim, num_heads, **kwargs)
    else:
        module = LinearAttention(dim, num_heads, **LINEAR[kind], **kwargs)
    with torch.no_grad():  # maps and tables that begin as nothing
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval()


def summed(module: torch.nn.Module, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weights @ v of x (B, N, dim), projected."""
    v = module.heads(module.qkv(x).chunk(module.parts, -1)[2])
    return module.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


@pytest.mark.parametrize("kind", ["softmax", *LINEAR])
@settings(max_examples=8, deadline=None)
@given(H=st.integers(1, 5), W=st.integers(1, 5))
def test_summing_values_with_the_map_is_the_attention(kind: str, H: int, W: int) -> None:
    module, x = mixer(kind), torch.randn(2, H, W, 16, dtype=torch.float64)
    weights = module.attention_map(x, H, W)
    assert weights.shape == (2, 2, H * W, H * W)
    torch.testing.assert_close(summed(module, weights, x.flatten(1, 2)), module(x).flatten(1, 2))
    if kind in SUM_TO_ONE:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, H * W, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["softmax", "hedgehog", "focused", "global query"])
def test_prefix_tokens_have_weights_too(kind: str) -> None:
    module, x = mixer(kind), torch.randn(2, 1 + 3 * 4, 16, dtype=torch.float64)
    torch.testing.assert_close(summed(module, module.attention_map(x, 3, 4), x), module.forward_tokens(x, 3, 4))


def test_as_the_papers_write_it() -> None:
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    softmax, hedgehog = mixer("softmax"), mixer("hedgehog")
    q, k, _ = softmax.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5
    torch.testing.assert_close(softmax.attention_map(x, 3, 4), scores.softmax(-1))

    q, k, _ = hedgehog.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
    q, k = (torch.einsum("bnhd,hde->bnhe", t, w)
            for t, w in ((q, hedgehog.feature_map.q_weight), (k, hedgehog.feature_map.k_weight)))
    q, k = (torch.cat((F.softmax(t, -1), F.softmax(-t, -1)), -1) for t in (q, k))
    pairs = torch.einsum("bnhd,bmhd->bhnm", q, k)
    expected = pairs / pairs.sum(-1, keepdim=True)
    weights, parameters = hedgehog.attention_map(x, 3, 4), list(hedgehog.feature_map.parameters())
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=0)
    grads = (torch.autograd.grad(-t.log().diagonal(dim1=2, dim2=3).sum(), parameters) for t in (weights, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_frame_adds_nothing_to_the_map() -> None:
    torch.manual_seed(0)
    bare = LinearAttention(16, 2).double()
    framed = LinearAttention(16, 2, local_kernel=3, gate="mul", out_norm=True).double()
    framed.load_state_dict({"qkv.weight": torch.cat((bare.qkv.weight, torch.randn(16, 16))),
                            "qkv.bias": torch.cat((bare.qkv.bias, torch.randn(16)))}, strict=False)
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(framed.attention_map(x, 3, 4), bare.attention_map(x, 3, 4))


@pytest.mark.parametrize("attention", [SoftmaxAttention, LinearAttention])
def test_rotary_embeddings_turn_the_map(attention: type) -> None:
    torch.manual_seed(0)
    module = attention(16, 2, rotary="head").double()
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    y = summed(module, module.attention_map(x, 3, 4), x.flatten(1, 2))
    torch.testing.assert_close(y, module(x).flatten(1, 2))
    with pytest.raises(ValueError, match="a sequence with prefix tokens is none"):
        module.attention_map(x.flatten(1, 2), 3, 4)


def test_split_heads_have_no_one_map() -> None:
    with pytest.raises(ValueError, match="'polar' has no one attention map a head"):
        LinearAttention(16, 2, feature_map="polar").attention_map(torch.randn(1, 2, 2, 16), 2, 2)
