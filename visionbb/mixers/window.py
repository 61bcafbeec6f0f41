"""Softmax attention inside windows that tile the map."""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from timm.models import register_notrace_function, register_notrace_module
from torch import nn

from .attention import relative_bias
from .dropout import Dropout
from .linear import Linear
from .slabs import in_slabs


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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        x = to_windows(x, self.rows, self.cols).flatten(1, 2)
        if torch.jit.is_scripting():
            x = self.attend(x)
        else:  # q, k, v and the result are four maps
            x = in_slabs(self.attend, x, 4 * x.shape[1] * x.shape[2])
        return from_windows(x.unflatten(1, (self.rows, self.cols)), H, W)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Of windows (windows, tokens, dim), each by itself."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(self.proj(y))

    def extra_repr(self) -> str:
        return f"window_size=({self.rows}, {self.cols})"


@register_notrace_module  # windows by the size of the map
class ShiftedWindowAttention(WindowAttention):
    """`WindowAttention` with a bias by relative position, in windows that may be shifted (Swin, arXiv 2103.14030).

    A shifted map is rolled: what leaves it above comes back below, in windows with tokens that it is far from, and it
    attends to none of them. Along an axis where one window holds the map there is nothing to shift.

    Args:
        shift: tokens from the map's upper left corner to that of a window, below the window's sides; 0 for none.
        The rest is as in `WindowAttention`.

    Raises:
        ValueError: as `WindowAttention`, or a shift below 0 or as long as a side of the window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        shift: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, window_size, qkv_bias, proj_drop, **dd)
        if not 0 <= shift < min(self.rows, self.cols):
            raise ValueError(f"shift must be in [0, {min(self.rows, self.cols)}), got {shift}")
        self.shift = shift
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * self.rows - 1, 2 * self.cols - 1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"rpb"}

    def bias(self, H: int, W: int, down: int, right: int) -> torch.Tensor:
        """(1, heads or windows * heads, N, N), -inf for tokens that rolling by (down, right) has brought together."""
        bias = relative_bias(self.rpb, self.rows, self.cols)
        if down > 0 or right > 0:
            rows = regions(H, self.rows, down, bias.device)
            cols = regions(W, self.cols, right, bias.device)
            region = to_windows((3 * rows[:, None] + cols)[None, :, :, None], self.rows, self.cols).flatten(1)
            apart = region[:, None, :, None] != region[:, None, None, :]
            bias = bias.masked_fill(apart, float("-inf")).flatten(0, 1)
        return bias[None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, C = x.shape
        x = pad_map(x, self.rows, self.cols)
        rows, cols = x.shape[1], x.shape[2]
        down, right = self.shift if rows > self.rows else 0, self.shift if cols > self.cols else 0
        if down > 0 or right > 0:
            x = torch.roll(x, [-down, -right], [1, 2])
        windows = to_windows(x, self.rows, self.cols).flatten(1, 2)
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias(rows, cols, down, right).to(qkv.dtype)
        # Windows beside heads, so that all images share one bias.
        q, k, v = qkv.reshape(3, -1, bias.shape[1], self.rows * self.cols, C // self.num_heads).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.unflatten(1, (-1, self.num_heads)).transpose(2, 3)
        # A copy in any case: exporters choose another attention than they have traced, of another layout.
        y = y.clone(memory_format=torch.contiguous_format).view(windows.shape)
        y = self.proj_drop(self.proj(y))
        x = from_windows(y.unflatten(1, (self.rows, self.cols)), rows, cols)
        if down > 0 or right > 0:
            x = torch.roll(x, [down, right], [1, 2])
        return x[:, :H, :W]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift}"


def regions(length: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Of the places of an axis rolled by `shift`: 0, or in the last window 1, or 2 where the axis begins anew."""
    place = torch.arange(length, device=device)
    return (place >= length - window).int() + (place >= length - shift).int()


@register_notrace_function  # pads where the size of the map asks for it
def pad_map(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(B, H, W, C) with zeros at the bottom and the right, up to multiples of `rows` and `cols`."""
    bottom, right = (rows - x.shape[1] % rows) % rows, (cols - x.shape[2] % cols) % cols
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


@register_notrace_function  # pads where the size of the map asks for it
def to_windows(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(B, H, W, C), padded as by `pad_map`, to the windows that tile it, (B * windows, rows, cols, C), row by row."""
    x = pad_map(x, rows, cols)
    B, H, W, C = x.shape
    x = x.view(B, H // rows, rows, W // cols, cols, C).transpose(2, 3)
    return x.reshape(B * (H // rows) * (W // cols), rows, cols, C)


@register_notrace_function  # crops where the size of the map asks for it
def from_windows(x: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """The map (B, H, W, C) that `to_windows` made x (B * windows, rows, cols, C) of, without the padding."""
    _, rows, cols, C = x.shape
    n, m = (H + rows - 1) // rows, (W + cols - 1) // cols
    x = x.reshape(x.shape[0] // (n * m), n, m, rows, cols, C).transpose(2, 3)
    return x.reshape(x.shape[0], n * rows, m * cols, C)[:, :H, :W]
