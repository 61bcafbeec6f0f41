"""RWKV's mixers as Vision-RWKV has them: of tokens by bidirectional WKV, of channels by a gated squared ReLU."""

import math

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import register_notrace_module
from torch import nn

from ..kernels import bi_wkv
from .linear import Linear


def q_shift(x: torch.Tensor) -> torch.Tensor:
    """Neighbours in place of the tokens of (B, H, W, C), C a multiple of 4, zeros where there are none.

    Quarters of the channels come from the left, the right, above and below (Vision-RWKV, equation 3).
    """
    out, q = torch.zeros_like(x), x.shape[-1] // 4
    out[:, :, 1:, :q] = x[:, :, :-1, :q]
    out[:, :, :-1, q : 2 * q] = x[:, :, 1:, q : 2 * q]
    out[:, 1:, :, 2 * q : 3 * q] = x[:, :-1, :, 2 * q : 3 * q]
    out[:, :-1, :, 3 * q :] = x[:, 1:, :, 3 * q :]
    return out


def channel_ramp(dim: int, power: float) -> torch.Tensor:
    """(c / dim)^power for every channel c: RWKV's initial share of a token itself in a mix with others."""
    return (torch.arange(dim) / dim) ** power


@register_notrace_module  # the size of the map
class SpatialMix(nn.Module):
    """Vision-RWKV's mixing of tokens (arXiv 2403.02308, section 3.3), on (B, H, W, dim) of any H, W.

        k, v, r = key(x_k), value(x_v), receptance(x_r);    output(sigmoid(r) * norm(bi_wkv(w / T, u / T, k, v)))

    with x_k, x_v and x_r mixtures of the tokens and their shifted neighbours (`q_shift`), channel by channel, and T the
    number of tokens, so that the decay w and the bonus u mean the same on any map (`visionbb.kernels.bi_wkv`).

    Args:
        dim: a multiple of 4.
        index, depth: of the block, and how many there are; initial values depend on them.
        norm: whether to norm the result before its gate.

    Raises:
        ValueError: dim is no multiple of 4.
    """

    def __init__(self, dim: int, index: int = 0, depth: int = 1, norm: bool = False, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        self.index, self.depth = index, depth
        self.decay = nn.Parameter(torch.empty(dim, **dd))
        self.bonus = nn.Parameter(torch.empty(dim, **dd))
        self.mix_k = nn.Parameter(torch.empty(dim, **dd))
        self.mix_v = nn.Parameter(torch.empty(dim, **dd))
        self.mix_r = nn.Parameter(torch.empty(dim, **dd))
        self.key = Linear(dim, dim, bias=False, **dd)
        self.value = Linear(dim, dim, bias=False, **dd)
        self.receptance = Linear(dim, dim, bias=False, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd) if norm else nn.Identity()
        self.output = Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As RWKV: channels from long memory to short, and the deeper the block, the more of the neighbours."""
        dim, share = len(self.decay), 1 - self.index / self.depth
        deep = self.index / max(1, self.depth - 1)
        with torch.no_grad():
            self.decay.copy_(torch.linspace(0, 1, dim) ** (0.7 + 1.3 * deep) * 8 - 5)
            self.bonus.copy_(math.log(0.3) + ((torch.arange(dim) + 1) % 3 - 1) * 0.5)
            self.mix_k.copy_(channel_ramp(dim, share))
            self.mix_v.copy_(channel_ramp(dim, share) + 0.3 * deep)
            self.mix_r.copy_(channel_ramp(dim, 0.5 * share))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"bonus", "decay", "mix_k", "mix_r", "mix_v"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted = q_shift(x)
        k = self.key(torch.lerp(shifted, x, self.mix_k.to(x.dtype)))
        v = self.value(torch.lerp(shifted, x, self.mix_v.to(x.dtype)))
        r = self.receptance(torch.lerp(shifted, x, self.mix_r.to(x.dtype)))
        share = 1 / (x.shape[1] * x.shape[2])
        w, u = self.decay * share, self.bonus * share
        if torch.jit.is_scripting():
            y = torch.ops.visionbb.bi_wkv(w, u, k, v, 1e-6)
        else:
            y = bi_wkv(w, u, k, v)
        return self.output(r.sigmoid() * self.norm(y))


@register_notrace_module  # neighbours on the map
class ChannelMix(nn.Module):
    """Vision-RWKV's mixing of channels (arXiv 2403.02308, equation 6), on (B, H, W, dim) of any H, W.

        sigmoid(receptance(x_r)) * value(norm(relu(key(x_k))^2))

    with x_k and x_r mixtures of the tokens and their neighbours, as in `SpatialMix`.

    Args:
        dim: a multiple of 4.
        index, depth: of the block, and how many there are; initial values depend on them.
        mlp_ratio: hidden width over dim.
        norm: whether to norm the hidden layer.

    Raises:
        ValueError: dim is no multiple of 4.
    """

    def __init__(
        self,
        dim: int,
        index: int = 0,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        norm: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        self.index, self.depth = index, depth
        hidden = int(dim * mlp_ratio)
        self.mix_k = nn.Parameter(torch.empty(dim, **dd))
        self.mix_r = nn.Parameter(torch.empty(dim, **dd))
        self.key = Linear(dim, hidden, bias=False, **dd)
        self.norm = LayerNorm(hidden, eps=1e-5, **dd) if norm else nn.Identity()
        self.value = Linear(hidden, dim, bias=False, **dd)
        self.receptance = Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        ramp = channel_ramp(len(self.mix_k), 1 - self.index / self.depth)
        with torch.no_grad():
            self.mix_k.copy_(ramp)
            self.mix_r.copy_(ramp)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"mix_k", "mix_r"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted = q_shift(x)
        hidden = F.relu(self.key(torch.lerp(shifted, x, self.mix_k.to(x.dtype))), inplace=True).square()
        gate = self.receptance(torch.lerp(shifted, x, self.mix_r.to(x.dtype))).sigmoid()
        return gate * self.value(self.norm(hidden))
