"""State-space mixers: the scans of a map along several routes, and the form without any scan."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import register_notrace_module
from torch import nn

from ..kernels import scan_routes, ss2d, ssd
from .conv import DepthwiseConv
from .dropout import Dropout
from .linear import Linear, linear


class WideNorm(LayerNorm):
    """LayerNorm (eps 1e-5) of an operator's float32 result, whatever the type of the parameters."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def init_time_steps_(bias: torch.Tensor, shortest: float = 1e-3, longest: float = 0.1) -> None:
    """Biases whose softplus, the time step, is log-uniform between the two (Mamba, arXiv 2312.00752, section 3.6)."""
    with torch.no_grad():
        dt = torch.rand_like(bias).mul_(math.log(longest / shortest)).add_(math.log(shortest)).exp_()
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of the softplus


class ChannelAttention(nn.Module):
    """x * sigmoid(fc2(gelu(fc1(mean of norm(x) over the map)))), on (B, H, W, ..., dim): a gate for every channel.

    The channels' half of LightViT's bi-dimensional attention (arXiv 2207.05557), as EfficientVMamba and LocalMamba have
    it. Maps that stand side by side, between W and the channels, have gates of their own by the same weights.

    Args:
        reduction: dim over the hidden width.

    Raises:
        ValueError: the hidden width is below 1.
    """

    def __init__(self, dim: int, reduction: int = 8, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim < reduction:
            raise ValueError(f"dim must be at least reduction = {reduction}, got {dim}")
        self.norm = WideNorm(dim, **dd)
        self.fc1 = Linear(dim, dim // reduction, **dd)
        self.fc2 = Linear(dim // reduction, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.norm(x).mean((1, 2), keepdim=True).to(self.fc1.weight.dtype)
        return x * self.fc2(F.gelu(self.fc1(mean))).sigmoid()


@register_notrace_module  # routes by the size of the map
class SS2D(nn.Module):
    """VMamba's 2-D selective scan (arXiv 2401.10166), on (B, H, W, dim) of any H, W.

        u = silu(conv(in_proj(x)));    y = norm(merged scans of u along the routes);    out_proj(y * silu(gate))

    The operator is `visionbb.kernels.ss2d`: each route has its own time steps, B, C, A and D.

    Args:
        d_state: N, numbers a channel's state is made of.
        expand: width of the scan over dim.
        dt_rank: of the projection to time steps; by default dim / 16, rounded up.
        conv_bias: of the 3 x 3 depthwise convolution.
        gate: another projection, whose SiLU multiplies the normed scan (Mamba's block, VMamba's first release).
        routes: names as in `visionbb.kernels.scan_routes`.
        merge: of the scans, as in `visionbb.kernels.ss2d`: "sum", or "scatter" for routes that share out the map;
            "stack" passes each through `ChannelAttention` and adds them up (LocalMamba, arXiv 2403.09338).
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: d_state, dt_rank or the width of the scan is below 1, or a name that is none.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_bias: bool = False,
        gate: bool = False,
        routes: Sequence[str] = ("cross",),
        merge: str = "sum",
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        if min(d_state, rank, inner) < 1:
            raise ValueError(f"d_state, dt_rank and expand * dim must be at least 1, got {d_state}, {rank}, {inner}")
        if merge not in ("sum", "scatter", "stack"):
            raise ValueError(f"merge must be sum, scatter or stack, got {merge!r}")
        self.routes = list(routes)
        self.merge = merge
        self.gate = gate
        K = len(scan_routes(self.routes, 64, 64))
        self.in_proj = Linear(dim, 2 * inner if gate else inner, bias=False, **dd)
        self.conv = DepthwiseConv(inner, 3, bias=conv_bias, **dd)
        # Parameters of all routes: time steps, B and C from a token; time steps of all channels; A and D.
        self.x_proj = nn.Parameter(torch.empty(K, rank + 2 * d_state, inner, **dd))
        self.dt_proj = nn.Parameter(torch.empty(K, inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(K, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(K, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(K, inner, **dd))
        self.attn = ChannelAttention(inner, **dd) if merge == "stack" else nn.Identity()
        self.norm = WideNorm(inner, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.proj_drop = Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba: A = -1 .. -N, D = 1, time steps of 0.001 to 0.1."""
        for weight in (self.x_proj, self.dt_proj):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        init_time_steps_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.A_log.shape[2] + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}

    def project(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """Time steps, B and C of every token for all routes, or, where they share out the map, for its own alone."""
        if self.merge != "scatter":
            return linear(x, self.x_proj.flatten(0, 1))
        _, H, W, _ = x.shape
        rows = x.flatten(1, 2).index_select(1, routes.flatten().clamp(min=0)).unflatten(1, [routes.shape[0], -1])
        rows = torch.einsum("bksd,krd->bksr", rows, self.x_proj).flatten(1, 2)
        # Sorted by the tokens that they visit, the steps are in raster order; pads come first.
        return rows.index_select(1, routes.flatten().argsort()[-H * W :]).unflatten(1, [H, W])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        x = self.in_proj(x)
        gate: torch.Tensor | None = None
        if self.gate:
            x, gate = x.chunk(2, -1)
        x = F.silu(self.conv(x))
        A = -self.A_log.exp()
        if torch.jit.is_scripting():
            routes = torch.ops.visionbb.scan_routes(self.routes, H, W, device=x.device)
            y = torch.ops.visionbb.ss2d(
                x, self.project(x, routes), self.dt_proj, self.dt_bias, A, self.D, routes, self.merge, "all"
            )
        else:
            routes = scan_routes(self.routes, H, W, device=x.device)
            proj = self.project(x, routes)
            y = ss2d(x, proj, self.dt_proj, self.dt_bias, A, self.D, routes, merge=self.merge)
        if self.merge == "stack":
            y = self.attn(y).sum(-2)
        y = self.norm(y).to(x.dtype)
        if gate is not None:
            y = y * F.silu(gate)
        return self.proj_drop(self.out_proj(y))


@register_notrace_module  # parts of one projection
class NonCausalSSD(nn.Module):
    """VSSD's state-space duality without an order of tokens (arXiv 2407.18559), on (B, H, W, dim) of any H, W.

        z, u, dt = in_proj(x);    v, B, C = silu(conv(u))
        y = norm(ssd(v, softplus(dt + dt_bias), A, B, C, D));    out_proj(y * z)

    Every token adds to one state and reads from it (`visionbb.kernels.ssd`): no scan, linear cost.

    Args:
        num_heads: must divide expand * dim; each head has one A, D and time step a token, B and C are shared.
        d_state: N, rows of a head's state.
        expand: width of the values over dim.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: expand * dim is no multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        d_state: int = 64,
        expand: int = 2,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = expand * dim
        if inner % num_heads:
            raise ValueError(f"expand * dim must be a multiple of num_heads, got {inner} and {num_heads}")
        self.num_heads = num_heads
        self.split = [inner, inner + 2 * d_state, num_heads]
        self.d_state = d_state
        self.in_proj = Linear(dim, sum(self.split), bias=False, **dd)
        self.conv = DepthwiseConv(inner + 2 * d_state, 3, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm = WideNorm(inner, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.proj_drop = Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba-2: A from -16 to -1, D = 1, time steps of 0.001 to 0.1."""
        init_time_steps_(self.dt_bias)
        nn.init.uniform_(self.A_log, 1.0, 16.0)
        with torch.no_grad():
            self.A_log.log_()
        nn.init.ones_(self.D)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, x, dt = self.in_proj(x).split(self.split, -1)
        x = F.silu(self.conv(x))
        x, B, C = x.split([self.split[0], self.d_state, self.d_state], -1)
        dt = F.softplus(dt + self.dt_bias)
        A = -self.A_log.exp()
        heads = x.unflatten(-1, (self.num_heads, -1))
        if torch.jit.is_scripting():
            y = torch.ops.visionbb.ssd(heads, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), self.D)
        else:
            y = ssd(heads, dt, A, B, C, self.D)
        return self.proj_drop(self.out_proj(self.norm(y.flatten(-2)).to(x.dtype) * z))
