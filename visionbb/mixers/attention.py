"""Global attention on a map: the frame that softmax and linear attention share, and softmax attention itself."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from ..kernels import Rotary, rotary2d
from .conv import DepthwiseConv
from .dropout import Dropout
from .linear import Linear

ROTARY = ("", "head", "map")
GATES = ("", "mul", "silu")
SILU_ONE = 1.2784645427610738  # silu of it is 1


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

    in_proj = "qkv"  # the linear layer of `projections`, the names of its parts

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
        self.projections = ("q", "k", *(["v"] if value_proj else []), *(["gate"] if gate else []))
        self.parts = len(self.projections)
        self.qkv = Linear(dim, self.parts * dim, bias=qkv_bias, **dd)
        self.local = None
        if local_kernel:
            self.local = DepthwiseConv(dim, local_kernel, repeats=num_heads if share_local else 1, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd) if out_norm else None
        self.proj = Linear(dim, dim, **dd) if out_proj else nn.Identity()
        self.proj_drop = Dropout(proj_drop)

    @torch.jit.ignore
    def begin_plain(self) -> None:
        """Lets attention alone act: no local convolution, a gate of one. Networks converted from ViTs start so.

        Raises:
            ValueError: a gate has no bias that could hold it at one.
        """
        with torch.no_grad():
            if self.local is not None:
                self.local.weight.zero_()
                self.local.bias.zero_()
            if self.gate:
                if self.qkv.bias is None:
                    raise ValueError("a gate begins at one by its bias: qkv_bias must be True, got False")
                self.qkv.weight.chunk(self.parts)[-1].zero_()
                self.qkv.bias.chunk(self.parts)[-1].fill_(SILU_ONE if self.gate == "silu" else 1.0)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def keys(self, k: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Keys of the tokens of `mix`, with what a subclass adds to them."""
        return k

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        local: torch.Tensor | None,
        gate: torch.Tensor | None,
        H: int,
        W: int,
    ) -> torch.Tensor:
        """(attention + local) * gate, from and to (B, H, W, heads, head_dim), or with prefix tokens as in `mix`."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """`gate` (B, H, W, dim) multiplies the result, where the block has one of its own (MILA)."""
        return self.mix(x, x.shape[1], x.shape[2], gate)

    def forward_tokens(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """On a sequence (B, P + H * W, dim), prefix tokens first: they attend like all others, without `local`."""
        if self.rotary_span > 0:
            raise ValueError("rotary embeddings turn the tokens of a map; a sequence with prefix tokens is none")
        return self.mix(x.unsqueeze(1), H, W).squeeze(1)

    def mix(self, x: torch.Tensor, H: int, W: int, gate: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, H, W, dim), or (B, 1, P + H * W, dim) with prefix tokens."""
        parts = self.qkv(x).chunk(self.parts, -1)
        v = parts[2] if self.value_proj else x
        local: torch.Tensor | None = None
        if self.local is not None:
            prefix = v.shape[1] * v.shape[2] - H * W
            if v.shape[1] == H and v.shape[2] == W:
                local = self.heads(self.local(v))
            else:
                patches = self.local(v[:, 0, prefix:].unflatten(1, (H, W))).flatten(1, 2)
                local = self.heads(F.pad(patches, (0, 0, prefix, 0)).unsqueeze(1))
        if gate is not None:
            gate = self.heads(gate)
            if self.gate:
                raise ValueError("gate must be None where the attention projects its own")
        if self.gate:
            gate = self.heads(F.silu(parts[-1]) if self.gate == "silu" else parts[-1])
        q, k, v = self.heads(parts[0]), self.heads(self.keys(parts[1], H, W)), self.heads(v)
        if self.norm is None:
            y = self.attend(q, k, v, local, gate, H, W).flatten(-2)
        else:
            y = self.norm(self.attend(q, k, v, local, None, H, W).flatten(-2))
            if gate is not None:
                y = y * gate.flatten(-2)
        return self.proj_drop(self.proj(y))

    def attention_map(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """The weights that values are summed with: a row a query, a column a key, (B, num_heads, N, N).

        Of a map x (B, H, W, dim) with N = H * W, or a sequence (B, P + H * W, dim) with its prefix tokens. Without what
        the frame adds: `attention_map @ v` is the result of attention alone. At a cost quadratic in N, for distillation
        and inspection.

        Raises:
            ValueError: rotary embeddings on a sequence, or an attention that has no one map a head.
        """
        if x.ndim == 3:
            if self.rotary_span > 0:
                raise ValueError("rotary embeddings turn the tokens of a map; a sequence with prefix tokens is none")
            x = x.unsqueeze(1)
        parts = self.qkv(x).chunk(self.parts, -1)
        q, k = self.heads(parts[0]), self.heads(self.keys(parts[1], H, W))
        N = x.shape[1] * x.shape[2]
        # Attention is linear in its values: those of a unit matrix give the weights.
        unit = torch.eye(N, dtype=q.dtype, device=q.device).view(1, x.shape[1], x.shape[2], 1, N)
        weights = self.attend(q, k, unit.expand(x.shape[0], -1, -1, self.num_heads, -1), None, None, H, W)
        return weights.flatten(1, 2).transpose(1, 2)


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
        H: int,
        W: int,
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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * map_size[0] - 1, 2 * map_size[1] - 1, **dd))
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"rpb"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=relative_bias(self.rpb, H, W).to(q.dtype))
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))


def relative_bias(rpb: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Additive bias of all tokens of a map to all, (heads, H * W, H * W), of a table (heads, rows, columns).

    That of a key and a query stands at key - query + length - 1 per axis, in the table resampled to the map.
    """
    rpb = resample_rpb(rpb, (2 * H - 1, 2 * W - 1))
    rows, cols = torch.arange(H, device=rpb.device), torch.arange(W, device=rpb.device)
    dy = rows[None, :] - rows[:, None] + H - 1
    dx = cols[None, :] - cols[:, None] + W - 1
    return rpb[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)


def resample_rpb(rpb: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A bias table (heads, rows, columns) at another size, bicubic; unchanged at its own."""
    if rpb.shape[1] == size[0] and rpb.shape[2] == size[1]:
        return rpb
    return F.interpolate(rpb.float()[None], size=size, mode="bicubic", align_corners=False)[0].to(rpb.dtype)
