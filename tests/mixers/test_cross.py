"""Attention of some tokens to others against loops over heads and windows."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.mixers import BidirectionalCrossAttention, CrossAttention, PatchCrossAttention


def by_heads(mixer: CrossAttention, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x (N, dim) to y (M, dim), one head after the other."""
    parts = mixer.q(x), *mixer.kv(y).chunk(2, -1)
    heads = []
    for q, k, v in zip(*(part.chunk(mixer.num_heads, -1) for part in parts), strict=True):
        heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return mixer.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("num_heads", [1, 4])
def test_equals_attention_head_by_head(num_heads):
    torch.manual_seed(0)
    mixer = CrossAttention(8, num_heads, dtype=torch.float64)
    x, y = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    want = torch.stack([by_heads(mixer, a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(mixer(x, y), want)


@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(1, 20), W=st.integers(1, 20), window=st.integers(1, 7), extra=st.integers(1, 4),
    tokens=st.integers(1, 3),
)
def test_a_window_attends_to_its_tokens_and_to_the_patch_it_lies_in(H, W, window, extra, tokens):
    torch.manual_seed(0)
    n, m = -(-H // window), -(-W // window)
    mixer = PatchCrossAttention(8, 2, window, window + extra, tokens, dtype=torch.float64)
    s = torch.randn(1, n * tokens, m * tokens, 8, dtype=torch.float64)
    x = torch.randn(1, H, W, 8, dtype=torch.float64)
    got = mixer(s, x)
    assert got.shape == s.shape
    for i in range(n):
        for j in range(m):
            spans = []
            for length, number, index in ((H, n, i), (W, m, j)):
                begin = max(0, min(index * length // number - extra // 2, length - window - extra))
                end = min(length, begin + window + extra)
                assert begin <= index * length // number  # the window lies in its patch
                assert -(-(index + 1) * length // number) <= end
                spans.append(slice(begin, end))
            here = slice(i * tokens, (i + 1) * tokens), slice(j * tokens, (j + 1) * tokens)
            own = s[0][here].flatten(0, 1)
            keys = torch.cat((own, x[0][spans[0], spans[1]].flatten(0, 1)))
            torch.testing.assert_close(got[0][here].flatten(0, 1), by_heads(mixer, own, keys))


def test_patches_of_the_authors():
    """10 tokens wide, 4 apart, on the 14 x 14 map of an image of 224 pixels."""
    places = PatchCrossAttention(8, 2).places(14, 2, torch.device("cpu"))
    assert places.tolist() == [list(range(10)), list(range(4, 14))]


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 10 and 4"):
        CrossAttention(10, 4)
    with pytest.raises(ValueError, match="patch_size must be above window_size = 7, got 7"):
        PatchCrossAttention(8, 2, 7, 7)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_what_was_gathered_is_handed_back_by_the_same_weights(num_heads):
    """Token by token: a token of y gets from each of x as much as that one took of it, whatever x has become."""
    torch.manual_seed(0)
    mixer = BidirectionalCrossAttention(4, num_heads, dtype=torch.float64)
    x, y, later = (torch.randn(n, 4, dtype=torch.float64) for n in (2, 5, 2))
    found, weights = mixer.gather(x[None], y[None])
    torch.testing.assert_close(found[0], by_heads(mixer, x, y))
    torch.testing.assert_close(mixer(x[None], y[None]), found)

    size = 4 // num_heads
    q, k = mixer.q(x), mixer.kv(y)[:, :4]
    given = torch.zeros(5, 4, dtype=torch.float64)
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(2):
            asked = torch.exp(torch.stack([q[i, part] @ k[j, part] for j in range(5)]) / size**0.5)
            share = asked / asked.sum()
            torch.testing.assert_close(weights[0, head, i], share)
            for j in range(5):
                given[j, part] += share[j] * mixer.v_back(later)[i, part]
    torch.testing.assert_close(mixer.hand_back(later[None], weights)[0], mixer.proj_back(given))


def test_a_hand_sized_example_of_both_ways():
    """Two tokens ask three, by logits log 1, log 2 and log 1 of the first and of the second's log 3, log 1, log 4."""
    mixer = BidirectionalCrossAttention(2, 1, dtype=torch.float64)
    with torch.no_grad():
        for layer in (mixer.q, mixer.proj, mixer.v_back, mixer.proj_back):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
        mixer.kv.weight.copy_(torch.eye(2).repeat(2, 1))
        mixer.kv.bias.zero_()
    logs = torch.tensor([[1.0, 3], [2, 1], [1, 4]], dtype=torch.float64).log()  # a row a token of y
    x = torch.eye(2, dtype=torch.float64) * 2**0.5  # the scale is 1 / sqrt(2)
    found, weights = mixer.gather(x[None], logs[None])
    shares = torch.tensor([[1 / 4, 2 / 4, 1 / 4], [3 / 8, 1 / 8, 4 / 8]], dtype=torch.float64)
    torch.testing.assert_close(weights[0, 0], shares)
    torch.testing.assert_close(found[0], shares @ logs)
    later = torch.tensor([[8.0, 0], [0, 16]], dtype=torch.float64)
    want = torch.tensor([[2.0, 6], [4, 2], [2, 8]], dtype=torch.float64)  # no second softmax: rows of any sum
    torch.testing.assert_close(mixer.hand_back(later[None], weights)[0], want)
