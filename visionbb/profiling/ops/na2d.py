"""2-D neighborhood attention with a relative position bias: ours, what one would write without it, and its peers.

All get the packed output of a qkv projection, (B, H, W, 3, heads, head_dim), and the bias (heads, 2k-1, 2k-1), and
return (B, H, W, heads, head_dim). Tables that depend on the shape alone are made before the clock starts: key and bias
indices of "gather", the N x N index of "dense", the block mask of "flex". What depends on the bias is timed, as in a
training step: its look-up by "gather", and the N x N mask that "dense" makes of it.

- gather: the k*k keys and values of every query are copied out by index, then multiplied (the unfold form);
- dense: scaled_dot_product_attention over all N keys, -inf outside of the windows;
- flex: compiled FlexAttention with a block mask and the bias as its score_mod (CUDA only: no backward on the CPU);
- natten: NATTEN 0.20 or newer, if installed; it has no bias, so that it does less work.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from visionbb.kernels import has_triton, na2d_qkvpacked
from visionbb.kernels.neighborhood.reference import axis_relation
from visionbb.kernels.neighborhood.window import Window

from ..op_bench import Contestant, OpBench, Unavailable


@dataclass(frozen=True)
class Case:
    side: int
    heads: int
    dilation: int
    kernel: int = 7
    head_dim: int = 32

    def __str__(self) -> str:
        return f"{self.side}x{self.side} h{self.heads} k{self.kernel} d{self.dilation}"

    def relation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per axis, (side, side): is the key in the query's window, and key - query + kernel - 1 in dilation steps."""
        window = Window((self.kernel,) * 2, (self.dilation,) * 2)
        inside, offset = axis_relation(self.side, window, 0)
        return inside, offset + self.kernel - 1


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch_size, case.side, case.side, 3, case.heads, case.head_dim)
    table = (case.heads, 2 * case.kernel - 1, 2 * case.kernel - 1)
    return (
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True),
        torch.randn(table, device=device, dtype=dtype, requires_grad=True),
    )


def ours(case: Case, device: torch.device | None = None):
    def attention(qkv, rpb=None):
        return na2d_qkvpacked(qkv, case.kernel, case.dilation, rpb=rpb)

    return attention


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def _heads_first(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v as (B, heads, N, head_dim) views."""
    return qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind()


def _heads_last(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).unflatten(1, like.shape[1:3])


def gather(case: Case, device: torch.device):
    inside, offset = case.relation()
    keys = inside.nonzero()[:, 1].view(case.side, case.kernel)
    biases = offset.gather(1, keys)

    def product(of: torch.Tensor, width: int) -> torch.Tensor:
        """(side, k) per axis -> (N, k*k) of the flattened map."""
        return (of[:, None, :, None] * width + of[None, :, None, :]).reshape(case.side**2, -1).to(device)

    keys, biases = product(keys, case.side), product(biases, 2 * case.kernel - 1)
    scale = case.head_dim**-0.5

    def attention(qkv, rpb):
        q, k, v = _heads_first(qkv)
        scores = (k[:, :, keys] @ (q * scale).unsqueeze(-1)).squeeze(-1)
        weights = (scores + rpb.flatten(1)[:, biases]).softmax(-1)
        return _heads_last((weights.unsqueeze(-2) @ v[:, :, keys]).squeeze(-2), qkv)

    return attention


def dense(case: Case, device: torch.device):
    inside, offset = case.relation()
    N, width = case.side**2, 2 * case.kernel - 1
    seen = (inside[:, None, :, None] & inside[None, :, None, :]).reshape(N, N)
    index = (offset[:, None, :, None] * width + offset[None, :, None, :]).reshape(N, N)
    # Unseen keys point at a column of -inf behind the table: bias and mask are one look-up.
    index = index.masked_fill(~seen, width**2).flatten().to(device)

    def attention(qkv, rpb):
        q, k, v = _heads_first(qkv)
        table = torch.cat([rpb.flatten(1), rpb.new_full((case.heads, 1), float("-inf"))], 1)
        mask = table.index_select(1, index).view(1, case.heads, N, N)
        return _heads_last(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), qkv)

    return attention


def flex(case: Case, device: torch.device):
    if device.type != "cuda":
        raise Unavailable("compiled FlexAttention has no backward on the CPU")
    from torch.nn.attention.flex_attention import flex_attention

    return flex_form(case, device, torch.compile(flex_attention, dynamic=False))


def flex_form(case: Case, device: torch.device, flex_attention):
    """The neighborhood as FlexAttention's block mask and score_mod, for a compiled or a plain `flex_attention`."""
    from torch.nn.attention.flex_attention import create_block_mask

    inside, offset = (t.to(device) for t in case.relation())
    side, N = case.side, case.side**2

    def seen(batch, head, query, key):
        return inside[query // side, key // side] & inside[query % side, key % side]

    mask = create_block_mask(seen, None, None, N, N, device=str(device))

    def attention(qkv, rpb):
        def bias(score, batch, head, query, key):
            # Keys outside of the window are masked, but their bias is looked up all the same.
            rows = offset[query // side, key // side].clamp(0, 2 * case.kernel - 2)
            cols = offset[query % side, key % side].clamp(0, 2 * case.kernel - 2)
            return score + rpb[head, rows, cols]

        return _heads_last(flex_attention(*_heads_first(qkv), score_mod=bias, block_mask=mask), qkv)

    return attention


def natten(case: Case, device: torch.device):
    try:
        from natten.functional import na2d as natten_na2d
    except ImportError as error:
        raise Unavailable(f"natten cannot be imported: {error}") from error

    def attention(qkv):
        return natten_na2d(*qkv.unbind(3), kernel_size=case.kernel, dilation=case.dilation)

    return attention


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """q, k and v read, the output written, once each."""
    return 4 * batch_size * case.side**2 * case.heads * case.head_dim * element


BENCH = OpBench(
    # The layers of NAT-Tiny (dilation 1) and DiNAT-Tiny (both) at 224 pixels.
    cases=tuple(Case(*c) for c in [(56, 2, 1), (56, 2, 8), (28, 4, 1), (28, 4, 4), (14, 8, 1), (14, 8, 2), (7, 16, 1)]),
    inputs=inputs,
    batched=1,
    reference=ours,
    contestants={
        "gather": Contestant(gather),
        "dense": Contestant(dense),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
        "flex": Contestant(flex),
        "natten": Contestant(natten, takes=1),
    },
    moved_bytes=moved_bytes,
)
