"""Attention of some tokens to others against loops over heads and windows."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.mixers import CrossAttention, PatchCrossAttention


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
