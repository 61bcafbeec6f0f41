"""Window attention against a loop over the windows, at any size of map and window."""
from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.mixers import ShiftedWindowAttention, WindowAttention, slabs


def by_loops(mixer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """What the docstring says: one window after the other, outside the map tokens of zeros."""
    B, H, W, C = x.shape
    out = torch.zeros_like(x)
    for top in range(0, H, mixer.rows):
        for left in range(0, W, mixer.cols):
            window = x.new_zeros(B, mixer.rows, mixer.cols, C)
            inside = x[:, top : top + mixer.rows, left : left + mixer.cols]
            rows, cols = inside.shape[1:3]
            window[:, :rows, :cols] = inside
            parts = mixer.qkv(window.flatten(1, 2)).chunk(3, -1)
            heads = []
            for q, k, v in zip(*(part.chunk(mixer.num_heads, -1) for part in parts), strict=True):
                weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
                heads.append(weights @ v)
            y = mixer.proj(torch.cat(heads, -1)).view(window.shape)
            out[:, top : top + rows, left : left + cols] = y[:, :rows, :cols]
    return out


@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(1, 9), W=st.integers(1, 9), rows=st.integers(1, 5), cols=st.integers(1, 5),
    num_heads=st.sampled_from([1, 2, 4]),
)
def test_equals_attention_window_by_window(H, W, rows, cols, num_heads):
    torch.manual_seed(0)
    mixer = WindowAttention(8, num_heads, (rows, cols), dtype=torch.float64)
    torch.nn.init.normal_(mixer.qkv.bias)  # the padding's keys and values
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    want = by_loops(mixer, x)
    torch.testing.assert_close(mixer(x), want)
    with torch.no_grad(), mock.patch.multiple(slabs, WIDEST_HIDDEN=0, SLAB=200):  # a few windows at a time
        torch.testing.assert_close(mixer(x), want)


def test_one_number_is_a_square_window_and_seven_the_default():
    assert (WindowAttention(8, 2).rows, WindowAttention(8, 2).cols) == (7, 7)
    assert (WindowAttention(8, 2, 4).rows, WindowAttention(8, 2, 4).cols) == (4, 4)


def test_gradients_pass_windows_and_padding():
    torch.manual_seed(0)
    mixer = WindowAttention(4, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(mixer, torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 4), "dim must be a multiple of num_heads, got 10 and 4"),
        ((8, 2, (7, 0)), "window_size must be at least 1"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(*args)


# ---- Swin's shifted windows -----------------------------------------------------------------------------------------


def swin_by_loops(mixer: ShiftedWindowAttention, x: torch.Tensor) -> torch.Tensor:
    """One query after the other: its keys are the tokens, zeros of the padding too, of the same window, unrolled."""
    rows, cols = mixer.rows, mixer.cols
    _, H, W, C = x.shape
    height, width = -(-H // rows) * rows, -(-W // cols) * cols
    padded = x.new_zeros(height, width, C)
    padded[:H, :W] = x[0]
    down, right = mixer.shift * (height > rows), mixer.shift * (width > cols)
    q, k, v = mixer.qkv(padded).unflatten(-1, (3, mixer.num_heads, -1)).permute(2, 3, 0, 1, 4)
    out = torch.zeros_like(padded)
    places = [(r, c) for r in range(height) for c in range(width)]

    def window(place):  # windows begin `shift` tokens in; those cut off at the borders stand alone
        return (place[0] - down) // rows, (place[1] - right) // cols

    for place in places:
        keys = [other for other in places if window(other) == window(place)]
        r, c = (torch.tensor(axis) for axis in zip(*keys, strict=True))
        bias = mixer.rpb[:, r - place[0] + rows - 1, c - place[1] + cols - 1]
        scores = torch.einsum("hd,hnd->hn", q[:, place[0], place[1]], k[:, r, c]) / q.shape[-1] ** 0.5
        weights = (scores + bias).softmax(-1)
        out[place] = torch.einsum("hn,hnd->hd", weights, v[:, r, c]).flatten()
    return mixer.proj(out)[None, :H, :W]


@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(1, 8), W=st.integers(1, 8), rows=st.integers(2, 4), cols=st.integers(2, 4), shift=st.integers(0, 1)
)
def test_shifted_windows_equal_attention_query_by_query(H, W, rows, cols, shift):
    torch.manual_seed(0)
    mixer = ShiftedWindowAttention(8, 2, (rows, cols), shift, dtype=torch.float64)
    torch.nn.init.normal_(mixer.qkv.bias)
    torch.nn.init.normal_(mixer.rpb)
    x = torch.randn(1, H, W, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), swin_by_loops(mixer, x))


def test_images_of_a_batch_share_nothing():
    torch.manual_seed(0)
    mixer = ShiftedWindowAttention(8, 2, 3, 1)
    x = torch.randn(3, 7, 5, 8)
    torch.testing.assert_close(mixer(x), torch.cat([mixer(image[None]) for image in x]))


def test_shift_within_the_window():
    with pytest.raises(ValueError, match=r"shift must be in \[0, 3\), got 3"):
        ShiftedWindowAttention(8, 2, (3, 4), 3)
