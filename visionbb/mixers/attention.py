"""Global attention on a map, for the plain baselines of the papers."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import nn


@register_notrace_module  # tables by the size of the map
class RelativeAttention(nn.Module):
    """Multi-head attention of all tokens to all, with a relative position bias, on (B, H, W, dim).

    The "ViT-rpb" baseline of DiNAT (arXiv 2209.15001, table 6). It is neighborhood attention whose window is the map:
    the bias of a key and a query stands at index key - query + length - 1 per axis.

    Args:
        num_heads: must divide dim.
        map_size: (rows, columns) the bias table is learned at; other maps get it resampled (bicubic).
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * map_size[0] - 1, 2 * map_size[1] - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"rpb"}

    def bias(self, H: int, W: int) -> torch.Tensor:
        """Additive bias of a map, (num_heads, H * W, H * W)."""
        rpb = resample_rpb(self.rpb, (2 * H - 1, 2 * W - 1))
        rows, cols = torch.arange(H, device=rpb.device), torch.arange(W, device=rpb.device)
        dy = rows[None, :] - rows[:, None] + H - 1
        dx = cols[None, :] - cols[:, None] + W - 1
        return rpb[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(H, W).to(q.dtype))
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))


def resample_rpb(rpb: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A bias table (heads, rows, columns) at another size, bicubic; unchanged at its own."""
    if rpb.shape[1] == size[0] and rpb.shape[2] == size[1]:
        return rpb
    return F.interpolate(rpb.float()[None], size=size, mode="bicubic", align_corners=False)[0].to(rpb.dtype)
