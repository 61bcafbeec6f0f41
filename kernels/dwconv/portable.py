"""Depthwise convolution by PyTorch's own operators, led around what is slow or wrong in them on a CPU.

A permuted NHWC tensor is NCHW in channels-last memory: oneDNN's depthwise kernels read it without a copy, at the speed
of memory, and put the weights in their order in a few microseconds a call. Processor time in ms of one x86 core with
AVX-512 (torch 2.11, float32, batch 8), ours against the candidates:

                     forward                                            gradient of the weight
                     ours   NCHW conv  shifted additions  unfold        ours   aten::convolution_backward
    56x56x64   k3     0.4     11.5            9.9                        0.6      0.6
    56x56x64   k7     1.8      9.6           51                          7       24
    56x56x64   k7 d3  2.9     46             47                          9       24
    14x14x256  k5     0.26     0.40           7.3          44            1.0      4.1
    14x14x256  k7 d3  0.54    10.3            8.9         109            3.3     23
    7x7x512    k7     0.22     0.31           7.7          52            0.9      5.8
    7x7x512    k9     0.37     0.38          12            86            1.6     35
    7x7x512    k7 d3  0.27     7.7            2.9          58            5.7     17

What oneDNN serves by a slow generic kernel instead, and what is done about it:
- forward, dilated, with a padding wider than 4 columns (AVX2; 6 with AVX-512) or than the map: 10 to 80 times slower.
  The rest of the padding is made by hand.
- gradient of the input: with a dilation, the flipped kernel's forward is up to 15 times faster.
- gradient of the weight with more than 3 columns, with a dilation, or with more rows than the map has. Columns are
  taken three at a time, dilation groups are maps of their own, and small maps are padded. In bfloat16 the generic
  kernel is not even right: with a dilation, on 56x56 maps, its result has nothing to do with the gradient.
Where none of this is so, in float32 with at most 3 columns, PyTorch's own gradient is taken: forward and backward are
1.3 to 1.9 times as fast as by our op.

The residual of a large map goes into the weights, x + conv(x) being a convolution with 1 added to the centre tap: that
saves a pass over the map, 16 % for 224 channels on 56x56. Not in half precision, where the 1 would take digits from the
weight, and not where the map is in cache and the pass costs less than changing the weights.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

FAST_PADDING = 4  # columns; what oneDNN's kernels for dilated convolutions take by themselves
FAST_COLUMNS = 3  # of a kernel; what those for the gradient of the weight take
FOLD_FROM = 1 << 18  # elements of a map


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, residual: bool
) -> torch.Tensor:
    """The op on (B, H, W, C), contiguous."""
    _, _, kh, kw = weight.shape
    folded = residual and x.dtype in (torch.float32, torch.float64) and x.numel() >= FOLD_FROM
    if folded:
        weight = weight.clone()
        weight.select(3, kw // 2).select(2, kh // 2).add_(1)
    rows, columns = kh // 2 * dilation, kw // 2 * dilation
    padded = x if x.stride(-1) == 1 else x.contiguous()
    if dilation > 1 and x.is_cpu:
        by_hand = columns - min(columns, FAST_PADDING, x.shape[2])
        if by_hand:
            padded, columns = F.pad(padded, (0, 0, by_hand, by_hand)), columns - by_hand
    out = F.conv2d(padded.permute(0, 3, 1, 2), weight, bias, 1, (rows, columns), dilation, x.shape[-1])
    out = out.permute(0, 2, 3, 1).contiguous()
    return out.add_(x) if residual and not folded else out


def trains_plainly(x: torch.Tensor, weight: torch.Tensor, dilation: int) -> bool:
    """Whether PyTorch's gradient of `forward`, one operator for all inputs, is faster than the op with ours."""
    _, H, W, _ = x.shape
    kh, kw = weight.shape[2:]
    fast = x.dtype == torch.float32 and dilation == 1 and kw <= FAST_COLUMNS
    return x.is_cpu and fast and kh <= H and kw <= 2 * W - 1


def exportable(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, residual: bool
) -> torch.Tensor:
    """The same as one standard operator (and an addition), for torch.export and ONNX."""
    padding = [size // 2 * dilation for size in weight.shape[2:]]
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 1, padding, dilation, x.shape[-1]).permute(0, 2, 3, 1)
    return x + out if residual else out


def weight_gradient(
    dout: torch.Tensor, x: torch.Tensor, kernel_size: tuple[int, int], dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the weight (C, 1, kh, kw) and of the bias (C,), for dout and x (B, H, W, C)."""
    kh, kw = kernel_size
    dbias = dout.sum((0, 1, 2))
    if not x.is_cpu:
        return _weight_gradient(dout, x, kernel_size, (kh // 2 * dilation, kw // 2 * dilation), dilation), dbias
    dout, x = (_dilation_groups(t, kernel_size, dilation) for t in (dout, x))
    if kw <= FAST_COLUMNS:
        return _weight_gradient(dout, x, kernel_size, (kh // 2, kw // 2)), dbias
    parts = []
    for first in range(0, kw, FAST_COLUMNS):
        size = min(FAST_COLUMNS, kw - first)
        offset = first - kw // 2
        shifted = F.pad(x, (0, 0, -offset, offset + size - 1))
        parts.append(_weight_gradient(dout, shifted, (kh, size), (kh // 2, 0)))
    return torch.cat(parts, -1), dbias


def _dilation_groups(x: torch.Tensor, kernel_size: tuple[int, int], dilation: int) -> torch.Tensor:
    """The groups of positions that one dilated kernel meets, as maps: (B * dilation^2, rows, columns, C).

    Zeros fill them up to one size, to the rows of the kernel, and to the columns that it shifts by.
    """
    B, H, W, C = x.shape
    rows, columns = max(-(-H // dilation), kernel_size[0]), max(-(-W // dilation), (kernel_size[1] + 1) // 2)
    below, right = rows * dilation - H, columns * dilation - W
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    if dilation == 1:
        return x
    return x.view(B, rows, dilation, columns, dilation, C).permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, C)


def _weight_gradient(
    dout: torch.Tensor, x: torch.Tensor, kernel_size: tuple[int, int], padding: tuple[int, int], dilation: int = 1
) -> torch.Tensor:
    C = x.shape[-1]
    return torch.ops.aten.convolution_backward(
        dout.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), x.new_empty(C, 1, *kernel_size), None,
        (1, 1), padding, (dilation, dilation), False, (0, 0), C, (False, True, False),
    )[1]
