"""Linear attention (ELU + 1) with rotary embedding, local term and gate: ours, what one would write without, peers.

All get q, k, v and the gate as one projection, (B, H, W, 4, heads, head_dim), and the local term (B, H, W, heads,
head_dim), and return (B, H, W, heads, head_dim). Cosines and sines, which depend on the shape alone, are made before
the clock starts.

- matmul: the sums over keys and values first, as the papers' code does in plain PyTorch;
- compiled: the same under torch.compile (CUDA only);
- dense: every pair of tokens has a weight, the N x N matrices of the definition (for maps of up to 4,096 tokens);
- flash_bla: flash-bidirectional-linear-attention, if installed; what it has no arguments for (feature map, rotary
  embedding, local term and gate) is PyTorch around it.

Softmax attention costs what "dense" would if it were fused, and is no contestant: it is another function.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from visionbb.kernels import Rotary, has_triton, linear_attention, use
from visionbb.kernels.rotary.table import angles

from ..op_bench import Contestant, OpBench, Unavailable

DENSE_TOKENS = 4096  # beyond, matrices of N x N in float64 do not fit a GPU's memory
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    side: int
    heads: int
    head_dim: int
    rotary_over: str = "head"  # or "map": all heads' channels (MILA)

    def __str__(self) -> str:
        return f"{self.side}x{self.side} h{self.heads} d{self.head_dim} rotary over {self.rotary_over}"

    @property
    def rotary(self) -> Rotary:
        if self.rotary_over == "head":
            return Rotary.closed(self.head_dim)
        return Rotary.half_open(self.heads * self.head_dim)


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch_size, case.side, case.side, 4, case.heads, case.head_dim)
    qkvg = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    return qkvg, torch.randn_like(qkvg[:, :, :, 0], requires_grad=True)


def ours(case: Case, device: torch.device | None = None):
    def attention(qkvg, local):
        q, k, v, gate = qkvg.unbind(3)
        return linear_attention(q, k, v, feature_map="elu", rotary=case.rotary, eps=EPS, local=local, gate=gate)

    return attention


def reference(case: Case):
    """The definition; for maps too large for it the portable path, which tests hold to it."""
    if case.side**2 <= DENSE_TOKENS:
        return ours(case)

    def attention(qkvg, local):
        with use("portable"):
            return ours(case)(qkvg, local)

    return attention


def dense(case: Case, device: torch.device):
    if case.side**2 > DENSE_TOKENS:
        raise Unavailable(f"{case.side**2} x {case.side**2} weights a head")
    return ours(case)


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def around(case: Case, device: torch.device, normalized):
    """The bench's attention from `normalized`(phi_q, phi_k, turned phi_q, turned phi_k, v), all (B, heads, N, d)."""
    span, side = case.rotary.span, case.side
    angle = angles(side, case.rotary, device)
    rows, cols = angle[:, None].expand(-1, side, -1), angle.expand(side, -1, -1)
    angle = torch.cat((rows, cols), -1)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    tables = {dtype: (cos.to(dtype), sin.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

    def turned(x):
        cos, sin = tables[x.dtype]
        a, b = x.flatten(3).unflatten(-1, (-1, span // 2, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).view(x.shape)

    def attention(qkvg, local):
        q, k, v, gate = qkvg.unbind(3)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = normalized(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, turned(q), turned(k), v)))
        return (y.transpose(1, 2).view(local.shape) + local) * gate

    return attention


def matmul(case: Case, device: torch.device):
    scale = 1 / case.side  # of keys and of values, so that their sums are means

    def normalized(q, k, turned_q, turned_k, v):
        total = q @ k.mean(2, keepdim=True).transpose(2, 3)
        return turned_q @ ((turned_k * scale).transpose(2, 3) @ (v * scale)) / (total + EPS)

    return around(case, device, normalized)


def compiled(case: Case, device: torch.device):
    if device.type != "cuda":
        raise Unavailable("is for CUDA")
    return torch.compile(matmul(case, device), dynamic=False)


def flash_bla(case: Case, device: torch.device):
    try:
        from flash_bla.ops.linear_attn.decoupled import decoupled_la
    except ImportError as error:
        raise Unavailable(f"flash_bla cannot be imported: {error}") from error

    def normalized(q, k, turned_q, turned_k, v):
        return decoupled_la(q, k, turned_q, turned_k, v, eps=EPS)

    return around(case, device, normalized)


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """q, k, v, local term and gate read, the output written, once each."""
    return 6 * batch_size * case.side**2 * case.heads * case.head_dim * element


BENCH = OpBench(
    # The linear stages of RAVLT-Tiny and MILA-Tiny at 224 pixels, and the first stage of a detector at 1024.
    cases=(
        Case(56, 1, 64), Case(28, 2, 64),
        *(Case(56 >> i, 2 << i, 32, "map") for i in range(4)),
        Case(256, 1, 64),
    ),
    inputs=inputs,
    batched=2,
    reference=reference,
    contestants={
        "matmul": Contestant(matmul),
        "compiled": Contestant(compiled),
        "dense": Contestant(dense, backend="reference"),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
        "flash_bla": Contestant(flash_bla),
    },
    moved_bytes=moved_bytes,
)
