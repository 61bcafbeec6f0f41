"""Depthwise convolution on NHWC maps."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from visionbb.mixers import DepthwiseConv


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
