"""Mamba's scan on sequences, and the mixers that Vim, LocalVim and MambaVision make of it."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from ..kernels import scan_routes, selective_scan
from .conv import SequenceConv
from .dropout import Dropout
from .linear import Linear, linear
from .state_space import ChannelAttention, init_time_steps_


@register_notrace_module  # parts of one projection
class S6(nn.Module):
    """Mamba's selective scan (arXiv 2312.00752, algorithm 2) behind its convolution, on (B, L, dim) of any L.

        u = silu(conv(x));    low, B, C = x_proj(u);    y = scan of u with softplus(dt_proj(low) + dt_bias), A, B, C, D

    The operator is `visionbb.kernels.selective_scan`.

    Args:
        conv: (B, L, dim) -> (B, L, dim).
        d_state: N, numbers a channel's state is made of.
        dt_rank: of the projection to time steps.
        reverse: scan from the last token to the first.

    Raises:
        ValueError: d_state or dt_rank is below 1.
    """

    def __init__(
        self, dim: int, conv: nn.Module, d_state: int, dt_rank: int, reverse: bool = False, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if min(d_state, dt_rank) < 1:
            raise ValueError(f"d_state and dt_rank must be at least 1, got {d_state} and {dt_rank}")
        self.reverse = reverse
        self.split = [dt_rank, d_state, d_state]
        self.conv = conv
        self.x_proj = nn.Parameter(torch.empty(sum(self.split), dim, **dd))
        self.dt_proj = nn.Parameter(torch.empty(dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(dim, **dd))
        self.A_log = nn.Parameter(torch.empty(dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba: A = -1 .. -N, D = 1, time steps of 0.001 to 0.1."""
        for weight in (self.x_proj, self.dt_proj):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        init_time_steps_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = F.silu(self.conv(x))
        low, B, C = linear(u, self.x_proj).split(self.split, -1)
        dt, A = linear(low, self.dt_proj), -self.A_log.exp()
        if torch.jit.is_scripting():
            B, C = B.unsqueeze(2), C.unsqueeze(2)
            y, _ = torch.ops.visionbb.selective_scan(u, dt, A, B, C, self.D, self.dt_bias, True, self.reverse)
            return y.to(u.dtype)
        else:
            return selective_scan(u, dt, A, B, C, self.D, None, self.dt_bias, True, reverse=self.reverse)


class BidirectionalMamba(nn.Module):
    """Vim's mixer (arXiv 2401.09417, algorithm 1): two scans of a sequence, from its first token and from its last.

        x, z = in_proj(x);    out_proj(silu(z) * (s6(x) + s6_reverse(x)) / 2)

    On (B, H, W, dim) of any H, W, row by row, or on sequences with prefix tokens. Each direction has its own
    parameters; its causal convolution sees what its scan has seen.

    Args:
        d_state: N, numbers a channel's state is made of.
        d_conv: taps of the convolutions.
        expand: width of the scans over dim.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, proj_drop: float = 0.0, device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.in_proj = Linear(dim, 2 * inner, bias=False, **dd)
        self.s6 = S6(inner, SequenceConv(inner, d_conv, **dd), d_state, rank, **dd)
        self.s6_reverse = S6(inner, SequenceConv(inner, d_conv, "future", **dd), d_state, rank, reverse=True, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        return self.forward_tokens(x.flatten(1, 2), H, W).unflatten(1, (H, W))

    def forward_tokens(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """On a sequence (B, P + H * W, dim), wherever its prefix tokens stand."""
        x, z = self.in_proj(x).chunk(2, -1)
        y = (self.s6(x) + self.s6_reverse(x)) * (F.silu(z) / 2)
        return self.proj_drop(self.out_proj(y))


@register_notrace_module  # routes by the size of the map
class LocalMamba(nn.Module):
    """LocalVim's mixer (arXiv 2403.09338): scans of a map along routes, each behind a convolution along its route.

        x, z = in_proj(x);    y_k = silu(z) * s6_k(x along route k), put back;    out_proj(attn(y_1) + attn(y_2) + ...)

    On (B, H, W, dim) of any H, W, or on a sequence with one prefix token.

    Args:
        routes: names as in `visionbb.kernels.scan_routes`, of routes that visit the whole map.
        d_state: N, numbers a channel's state is made of.
        d_conv: taps of the convolutions.
        expand: width of the scans over dim.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.routes = list(routes)
        self.in_proj = Linear(dim, 2 * inner, bias=False, **dd)
        self.s6 = nn.ModuleList(
            S6(inner, SequenceConv(inner, d_conv, **dd), d_state, rank, **dd)
            for _ in range(len(scan_routes(self.routes, 64, 64)))
        )
        self.attn = ChannelAttention(inner, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        return self.follow(x.flatten(1, 2), self.table(x, H, W)).unflatten(1, (H, W))

    def forward_tokens(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """On a sequence (B, 1 + H * W, dim), its prefix token behind H * W // 2 of the others, as in every route."""
        before = H * W // 2
        routes = self.table(x, H, W)
        routes = routes + (routes >= before).int()
        prefix = torch.full_like(routes[:, :1], before)
        return self.follow(x, torch.cat((routes[:, :before], prefix, routes[:, before:]), 1))

    def table(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """The routes of a map on x's device, (K, steps); see `visionbb.kernels.scan_routes`."""
        if torch.jit.is_scripting():
            return torch.ops.visionbb.scan_routes(self.routes, H, W, device=x.device)
        else:
            return scan_routes(self.routes, H, W, device=x.device)

    def follow(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) along routes (K, steps), which visit each of the L tokens once."""
        L = x.shape[1]
        x, z = self.in_proj(x).chunk(2, -1)
        x, gate = F.pad(x, (0, 0, 0, 1)), F.silu(z)  # pads, -1 in the table, read the row of zeros
        steps, back = routes % (L + 1), routes.argsort(1)[:, -L:]  # sorted by their tokens; pads come first
        y = torch.zeros_like(gate)
        for k, s6 in enumerate(self.s6):
            scanned = s6(x.index_select(1, steps[k])).index_select(1, back[k])
            y = y + self.attn((scanned * gate).unsqueeze(1)).squeeze(1)
        return self.proj_drop(self.out_proj(y))


class MambaVisionMixer(nn.Module):
    """MambaVision's mixer (arXiv 2407.08083, equation 6), on (B, H, W, dim) of any H, W, row by row.

        x, z = in_proj(x);    out_proj([s6(x) | silu(conv(z))])

    A branch without a scan makes up for what the scan, from the first token to the last, cannot see; convolutions see
    both neighbours. Both branches have half the channels.

    Args:
        dim: even.
        d_state: N, numbers a channel's state is made of.
        d_conv: taps of the convolutions, odd.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: an odd dim, or an even d_conv.
    """

    def __init__(
        self, dim: int, d_state: int = 8, d_conv: int = 3, proj_drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        half = dim // 2
        self.in_proj = Linear(dim, dim, bias=False, **dd)
        self.s6 = S6(half, SequenceConv(half, d_conv, "both", bias=False, **dd), d_state, math.ceil(dim / 16), **dd)
        self.conv = SequenceConv(half, d_conv, "both", bias=False, **dd)
        self.out_proj = Linear(dim, dim, bias=False, **dd)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        x, z = self.in_proj(x.flatten(1, 2)).chunk(2, -1)
        y = torch.cat((self.s6(x), F.silu(self.conv(z))), -1)
        return self.proj_drop(self.out_proj(y)).unflatten(1, (H, W))
