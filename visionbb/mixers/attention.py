"""Global attention on a map: the frame that softmax and linear attention share, and softmax attention itself."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from ..kernels import Rotary, rotary2d
from .conv import DepthwiseConv

ROTARY = ("", "head", "map")
GATES = ("", "mul", "silu")


class GlobalAttention(nn.Module):
    """What surrounds an attention of all tokens to all, on (B, H, W, dim) of any H, W; subclasses `attend`.

        q, k, v, g = qkv(x);    y = attend(q, k, v) + local(v);    proj(norm(y) * gate(g))

    Args:
        num_heads: must divide dim.
        rotary: 2-D rotary embedding over the channels of each head ("head", RALA) or of all ("map", MILA); "" for none.
        local_kernel: side of a depthwise convolution of v that is added to the result (LePE, CSWin); 0 for none.
        share_local: one kernel of head_dim channels for all heads (FLatten).
        gate: "mul" (RALA) or "silu" (NaLaFormer), a projection that multiplies the result; "" for none.
        out_norm: LayerNorm of the result, before the gate.
        value_proj: project v; False takes x itself (MILA, CARE).
        out_proj: project the result; False leaves it to the block (MILA).
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads, or an unknown name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rotary: str = "",
        local_kernel: int = 0,
        share_local: bool = False,
        gate: str = "",
        out_norm: bool = False,
        value_proj: bool = True,
        out_proj: bool = True,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if rotary not in ROTARY:
            raise ValueError(f"rotary must be one of {ROTARY}, got {rotary!r}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.gate = gate
        self.value_proj = value_proj
        self.rotary_span, self.rotary_ratio = 0, 1.0
        if rotary:
            turn = Rotary.closed(self.head_dim) if rotary == "head" else Rotary.half_open(dim)
            turn.check(dim)
            self.rotary_span, self.rotary_ratio = turn
        self.parts = 2 + int(value_proj) + int(gate != "")
        self.qkv = nn.Linear(dim, self.parts * dim, bias=qkv_bias, **dd)
        self.local = None
        if local_kernel:
            self.local = DepthwiseConv(dim, local_kernel, repeats=num_heads if share_local else 1, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd) if out_norm else None
        self.proj = nn.Linear(dim, dim, **dd) if out_proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        local: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """(attention + local) * gate, from and to (B, H, W, heads, head_dim)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(self.parts, -1)
        v = parts[2] if self.value_proj else x
        local: torch.Tensor | None = None
        if self.local is not None:
            local = self.heads(self.local(v))
        gate: torch.Tensor | None = None
        if self.gate:
            gate = self.heads(F.silu(parts[-1]) if self.gate == "silu" else parts[-1])
        q, k, v = self.heads(parts[0]), self.heads(parts[1]), self.heads(v)
        if self.norm is None:
            y = self.attend(q, k, v, local, gate).flatten(-2)
        else:
            y = self.norm(self.attend(q, k, v, local, None).flatten(-2))
            if gate is not None:
                y = y * gate.flatten(-2)
        return self.proj_drop(self.proj(y))


@register_notrace_module  # angles by the size of the map
class SoftmaxAttention(GlobalAttention):
    """softmax(q k^T / sqrt(head_dim)) v in that frame; q and k turn by the rotary embedding.

    The other half of the hybrids RAVLT, MAViT and NaLaFormer, whose late stages have few tokens.
    """

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        local: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.rotary_span > 0:
            q, k = self.turned(q), self.turned(k)
        q, k, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, values).transpose(1, 2).reshape(v.shape)
        if local is not None:
            y = y + local
        if gate is not None:
            y = y * gate
        return y

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.visionbb.rotary2d(x, self.rotary_span, self.rotary_ratio, False)
        else:
            return rotary2d(x, Rotary(self.rotary_span, self.rotary_ratio))


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
