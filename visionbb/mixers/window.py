"""Softmax attention inside windows that tile the map."""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_notrace_function, register_notrace_module
from torch import nn


@register_notrace_module  # windows by the size of the map
class WindowAttention(nn.Module):
    """Multi-head attention of the tokens of a window to each other, on (B, H, W, dim) of any H, W.

    Windows tile the map from its upper left corner (Swin, arXiv 2103.14030, without shift and position bias). A map
    that is no multiple of the window is extended by tokens of zeros at the right and the bottom, and these are keys and
    values like all others: their projections are the biases.

    Args:
        num_heads: must divide dim.
        window_size: tokens a side, or (rows, columns).
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads, or a side is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        rows, cols = to_2tuple(window_size)
        if rows < 1 or cols < 1:
            raise ValueError(f"window_size must be at least 1 a side, got {window_size}")
        self.num_heads = num_heads
        self.rows, self.cols = rows, cols
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        x = pad_map(x, self.rows, self.cols)
        n, m = x.shape[1] // self.rows, x.shape[2] // self.cols
        x = x.view(B, n, self.rows, m, self.cols, C).transpose(2, 3).reshape(-1, self.rows * self.cols, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.proj_drop(self.proj(x))
        x = x.view(B, n, m, self.rows, self.cols, C).transpose(2, 3).reshape(B, n * self.rows, m * self.cols, C)
        return x[:, :H, :W]

    def extra_repr(self) -> str:
        return f"window_size=({self.rows}, {self.cols})"


@register_notrace_function  # pads where the size of the map asks for it
def pad_map(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(B, H, W, C) with zeros at the bottom and the right, up to multiples of `rows` and `cols`."""
    bottom, right = (rows - x.shape[1] % rows) % rows, (cols - x.shape[2] % cols) % cols
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x
