"""SG-Former's attentions: hybrid-scale, which finds what tokens matter, and self-guided, which looks closer at them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import register_notrace_module
from torch import nn

from ..kernels import attention_column_mean
from .conv import DepthwiseConv
from .dropout import Dropout
from .linear import Linear


class LocalSumAttention(nn.Module):
    """Softmax attention of all tokens to all, and a convolution of a projection of its own, on (B, H, W, dim).

        q, k, v, u = in_proj(x);    proj(softmax(q k^T / sqrt(head_dim)) v + depthwise(u))

    Args:
        num_heads: must divide dim.
        width: of in_proj, where a subclass has other parts in it; u is the last `dim`.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int, proj_drop: float = 0.0, width: int | None = None, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.head_dim = dim // num_heads
        self.in_proj = Linear(dim, width or 4 * dim, **dd)
        self.local = DepthwiseConv(dim, 3, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, local = self.in_proj(x).chunk(4, -1)
        return self.projected(self.attend(q, k.flatten(1, 2), v.flatten(1, 2)), local)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, heads * head_dim) to (B, heads, N, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, W, C) to keys and values (B, M, C)."""
        y = F.scaled_dot_product_attention(self.heads(q.flatten(1, 2)), self.heads(k), self.heads(v))
        return y.transpose(1, 2).reshape(q.shape)

    def projected(self, y: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        return self.proj_drop(self.proj(y + self.local(local)))


@register_notrace_module  # windows and patches by the size of the map
class HybridScaleAttention(LocalSumAttention):
    """Attention to far and near: (B, H, W, dim) of any H, W to the same, and a significance map (B, H, W).

    SG-Former (arXiv 2308.12216, section 3.2). Half of the heads are global, with keys and values of patches of
    sr_ratio x sr_ratio tokens, gelu(norm(conv(x))). The others attend inside windows. A depthwise convolution of a
    projection of x is added, as in `LocalSumAttention`.

    A token is significant if it gets much attention: the mean of what the far heads of all tokens give to its patch,
    plus the mean of what the near heads of its window give to it. In float32 at least, without gradient.

    Windows tile the map from its upper left corner; those at the right and the bottom are as small as what is left, and
    their tokens are taken to get nothing from those that are missing. Tokens beyond the last whole patch are in none,
    and take the significance of the nearest; a map that is smaller than a patch is zero-padded to one.

    Args:
        num_heads: even; must divide dim.
        sr_ratio: tokens a side of a patch.
        window_size: tokens a side.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: num_heads is odd or does not divide dim, or a size is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        window_size: int = 7,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, proj_drop, 3 * dim, **dd)
        if num_heads % 2:
            raise ValueError(f"num_heads must be even, got {num_heads}")
        if sr_ratio < 1 or window_size < 1:
            raise ValueError(f"sr_ratio and window_size must be at least 1, got {sr_ratio} and {window_size}")
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.parts = [dim // 2, 3 * dim // 2, dim]  # queries to far; queries, keys, values to near; what is convolved
        self.reduce = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.kv = Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, qkv, local = self.in_proj(x).split(self.parts, -1)
        far, far_mean = self.far(q, x)
        near, near_mean = self.near(qkv)
        return self.projected(torch.cat((far, near), -1), local), far_mean + near_mean

    def far(self, q: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Global attention of q (B, H, W, dim / 2) to patches of x, and what tokens get of it, (B, H, W)."""
        _, H, W, _ = x.shape
        rows, cols = max(self.sr_ratio - H, 0), max(self.sr_ratio - W, 0)
        if rows > 0 or cols > 0:
            x = F.pad(x, (0, 0, 0, cols, 0, rows))
        patches = self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h, w = patches.shape[1], patches.shape[2]
        k, v = self.kv(self.act(self.norm(patches.flatten(1, 2)))).chunk(2, -1)
        mean = column_mean(self.heads(q.flatten(1, 2)), self.heads(k)).mean(1).unflatten(1, (h, w))
        return self.attend(q, k, v), F.interpolate(mean[:, None], (H, W)).squeeze(1)

    def near(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention inside windows, of queries, keys and values (B, H, W, 3 * dim / 2), and what tokens get."""
        B, H, W, C = qkv.shape
        y = qkv.new_empty(B, H, W, C // 3)
        mean = torch.empty(B, H, W, dtype=torch.promote_types(qkv.dtype, torch.float32), device=qkv.device)
        for top, bottom, r in spans(H, self.window_size):
            for left, right, c in spans(W, self.window_size):
                windows = qkv[:, top:bottom, left:right].unflatten(2, (-1, c)).unflatten(1, (-1, r))
                windows = windows.unflatten(-1, (3, -1, self.head_dim)).permute(5, 0, 1, 3, 6, 2, 4, 7)
                q, k, v = windows.flatten(5, 6).unbind(0)
                attention = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
                out = (attention @ v).unflatten(4, (r, c)).permute(0, 1, 4, 2, 5, 3, 6)
                y[:, top:bottom, left:right].view(out.shape).copy_(out)
                sums = attention.detach().sum(-2, dtype=mean.dtype).mean(3).unflatten(3, (r, c)).transpose(2, 3)
                mean[:, top:bottom, left:right].view(sums.shape).copy_(sums)
        return y, mean / self.window_size**2

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, sr_ratio={self.sr_ratio}, window_size={self.window_size}"


def column_mean(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """What keys get of the attention of queries, a mean over these: (B, heads, N or M, head_dim) to (B, heads, M)."""
    if torch.jit.is_scripting():
        scale = q.shape[-1] ** -0.5
        return torch.ops.visionbb.attention_column_mean(q.detach(), k.detach(), None, None, scale)
    else:
        return attention_column_mean(q, k)


def spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """Windows along an axis, (start, stop, size of each): a run of whole ones, and what is left."""
    whole = length - length % size
    runs: list[tuple[int, int, int]] = []
    if whole > 0:
        runs.append((0, whole, size))
    if whole < length:
        runs.append((whole, length, length - whole))
    return runs


@register_notrace_module  # groups by the number of tokens
class SelfGuidedAttention(LocalSumAttention):
    """Attention of all tokens to groups of them, small where tokens are significant, on (B, H, W, dim) of any H, W.

    SG-Former (arXiv 2308.12216, section 3.3). The tokens are sorted by a significance map, the least significant first,
    and cut into parts by rank. Groups of neighbours in that order make a key and a value each, from their learned
    weighted sum; how many is the part's. A depthwise convolution of a projection of x is added, as in
    `LocalSumAttention`.

    Tokens left over by the whole groups of a part join the next one; the last part is filled up with zeros in front.

    The authors build half of the keys from the transposed map. As tokens are sorted by value, both halves are the same
    but for ties; here they are built once.

    Args:
        num_heads: must divide dim.
        group_sizes: tokens a group, part by part.
        quarters: how many quarters of the tokens a part has, part by part; four in sum.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: num_heads does not divide dim, a size below 1, or quarters that are not as many or not four in sum.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_sizes: Sequence[int],
        quarters: Sequence[int],
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, proj_drop, 2 * dim, **dd)
        if min(group_sizes) < 1:
            raise ValueError(f"group_sizes must be at least 1, got {group_sizes}")
        if len(quarters) != len(group_sizes) or sum(quarters) != 4:
            raise ValueError(f"quarters must be one number a part ({len(group_sizes)}), four in sum, got {quarters}")
        self.quarters = list(quarters)
        self.groups = nn.ModuleList(Linear(size, 1, **dd) for size in group_sizes)
        self.kv = Linear(dim, 2 * dim, **dd)

    def forward(self, x: torch.Tensor, significance: torch.Tensor) -> torch.Tensor:
        q, local = self.in_proj(x).chunk(2, -1)
        k, v = self.kv(self.grouped(x.flatten(1, 2), significance.flatten(1))).chunk(2, -1)
        return self.projected(self.attend(q, k, v), local)

    def grouped(self, x: torch.Tensor, significance: torch.Tensor) -> torch.Tensor:
        """Weighted sums of the groups, the least significant first, (B, M, dim), of x (B, N, dim) and (B, N)."""
        B, N, C = x.shape
        order = significance.argsort(1) + torch.arange(0, B * N, N, device=x.device)[:, None]
        x = x.flatten(0, 1).index_select(0, order.flatten()).view(B, N, C)
        sums: list[torch.Tensor] = []
        start, quarters = 0, 0
        for i, group in enumerate(self.groups):
            size = group.in_features
            quarters += self.quarters[i]
            if quarters < 4:
                stop = start + (N // 4 * quarters - start) // size * size
                part = x[:, start:stop]
                start = stop
            else:
                part = F.pad(x[:, start:], (0, 0, (start - N) % size, 0))
            sums.append((part.unflatten(1, (-1, size)) * group.weight.T).sum(2) + group.bias)
        return torch.cat(sums, 1)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, quarters={self.quarters}"
