"""Attention of some tokens to others: of the few to the many that they stand for, and back."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from .dropout import Dropout
from .linear import Linear
from .window import from_windows, to_windows


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, dim) to y (B, M, dim); returns (B, N, dim).

    Args:
        num_heads: must divide dim.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attend(self.q(x), self.kv(y))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) to (B, num_heads, N, head_dim)"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Of queries (B, N, dim) to keys and values (B, M, 2 * dim)."""
        q = self.heads(q)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class BidirectionalCrossAttention(CrossAttention):
    """Attention of a few tokens to many, and of the many back to the few by the same weights.

    Of x (B, M, dim) and y (B, N, dim), head by head, with A = softmax(q(x) k(y)^T / sqrt(head_dim)), (M, N):

        gather:  proj(A v(y)) for x;    hand_back:  proj_back(A^T v_back(x)) for y.

    LookupViT, arXiv 2407.12753, whose second attention reuses the weights of the first. A^T is the transpose as it is,
    with no softmax of its own: its rows do not sum to one, and a token of y gets as much as it was asked for, M / N in
    the mean. All is linear in N; A is kept between the two, M x N numbers a head.

    Arguments and errors are those of `CrossAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_drop, **dd)
        self.v_back = Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj_back = Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.gather(x, y)[0]

    def gather(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What x finds in y, (B, M, dim), and the weights it is found with, (B, num_heads, M, N)."""
        q = self.heads(self.q(x))
        k, v = self.kv(y).chunk(2, -1)
        weights = (q * q.shape[-1] ** -0.5 @ self.heads(k).transpose(-2, -1)).softmax(-1)
        found = (weights @ self.heads(v)).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(found)), weights

    def hand_back(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What x (B, M, dim), changed in the meantime, has for y: (B, N, dim)."""
        given = (weights.transpose(-2, -1) @ self.heads(self.v_back(x))).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj_back(given))


@register_notrace_module  # patches by the size of the map
class PatchCrossAttention(CrossAttention):
    """Attention of the tokens of a window to each other and to the map around it (STViT, arXiv 2303.08685, 3.2).

    s (B, n * tokens, m * tokens, dim) holds `tokens` a side for each of the n x m windows that share the map
    x (B, H, W, dim) evenly. They attend to all of theirs, and to the patch of the map that the window lies in: it is
    `patch_size` tokens a side, or as many as the map has, with the window in the middle or, where that would leave the
    map, at the map's border.

    Args:
        window_size: the longest side of a window.
        patch_size: at least window_size + 1.
        tokens: a side, that a window has in s.
        The rest is as in `CrossAttention`.

    Raises:
        ValueError: dim is no multiple of num_heads, or a patch that may not hold a window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        patch_size: int = 10,
        tokens: int = 3,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop, device=device, dtype=dtype)
        if patch_size <= window_size:  # a window of a shared map may touch one token more than its longest side
            raise ValueError(f"patch_size must be above window_size = {window_size}, got {patch_size}")
        self.margin = (patch_size - window_size) // 2
        self.patch_size = patch_size
        self.tokens = tokens

    def forward(self, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows, cols = s.shape[1], s.shape[2]
        # Projections come before the patches, which overlap.
        own = to_windows(torch.cat((self.q(s), self.kv(s)), -1), self.tokens, self.tokens).flatten(1, 2)
        q, kv = own.split((s.shape[-1], 2 * s.shape[-1]), -1)
        top = self.places(x.shape[1], rows // self.tokens, x.device)
        left = self.places(x.shape[2], cols // self.tokens, x.device)
        patches = self.kv(x)[:, top[:, None, :, None], left[None, :, None, :]].flatten(3, 4).flatten(0, 2)
        y = self.attend(q, torch.cat((kv, patches), 1))
        return from_windows(y.unflatten(1, (self.tokens, self.tokens)), rows, cols)

    def places(self, length: int, windows: int, device: torch.device) -> torch.Tensor:
        """(windows, patch_size): the places of an axis that the patches of its windows take."""
        size = min(self.patch_size, length)
        begin = torch.arange(windows, device=device) * length // windows - self.margin
        return begin.clamp(0, length - size)[:, None] + torch.arange(size, device=device)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, tokens={self.tokens}"
