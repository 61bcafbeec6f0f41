"""Depthwise convolution on NHWC maps, and along sequences."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.mixers import DepthwiseConv, SequenceConv


@pytest.mark.parametrize(("kernel_size", "repeats", "residual"), [(3, 1, False), (5, 3, False), (7, 1, True)])
def test_equals_conv2d(kernel_size, repeats, residual):
    conv = DepthwiseConv(6, kernel_size, repeats, residual)
    plain = nn.Conv2d(6, 6, kernel_size, padding=kernel_size // 2, groups=6)
    plain.load_state_dict({name: torch.cat([p] * repeats) for name, p in conv.state_dict().items()})
    x = torch.randn(2, 5, 1, 6)
    expected = plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(conv(x), x + expected if residual else expected)


def test_output_stays_channels_last():
    """So that the permutations of the next convolution are views again."""
    assert DepthwiseConv(8)(torch.randn(2, 5, 6, 8)).is_contiguous()


def test_residual_of_a_wider_stream_is_not_narrowed():
    x = torch.full((1, 4, 4, 8), 1 + 2**-12)  # not a bfloat16 number
    conv = DepthwiseConv(8, residual=True)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "message"), [((8, 4), "kernel_size must be odd, got 4"), ((8, 3, 3), "multiple of repeats, got 8 and 3")]
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        DepthwiseConv(*args)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(("sees", "kernel_size"), [("past", 4), ("past", 1), ("future", 4), ("both", 3)])
def test_sequence_conv_sees_one_side_or_both(sees, kernel_size, length):
    torch.manual_seed(0)
    conv, x = SequenceConv(6, kernel_size, sees), torch.randn(2, length, 6)
    padded = x.flip(1) if sees == "future" else x
    beside = (1, 1) if sees == "both" else (kernel_size - 1, 0)
    want = F.conv1d(F.pad(padded.mT, beside), conv.weight, conv.bias, groups=6).mT
    torch.testing.assert_close(conv(x), want.flip(1) if sees == "future" else want)
    torch.testing.assert_close(torch.jit.script(conv)(x), conv(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [((8, 4, "none"), "sees must be 'past', 'future' or 'both', got 'none'"),
     ((8, 4, "both"), "kernel_size must be odd where a token sees both sides, got 4")],
)
def test_sequence_conv_errors(args, message):
    with pytest.raises(ValueError, match=message):
        SequenceConv(*args)
