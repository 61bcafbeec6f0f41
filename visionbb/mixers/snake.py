"""PlainMamba's mixer: scans along snakes, which know where each step came from."""
import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from ..kernels import scan_routes, ss2d
from .conv import DepthwiseConv
from .linear import Linear
from .state_space import init_time_steps_


def step_directions(routes: torch.Tensor, W: int) -> torch.Tensor:
    """How each step of the routes (K, H * W) came to its token: 1 from the left, 2 from the right, 3 from below, 4 from
    above, and 0 at the start; the tokens of neighbouring steps are neighbours on a map of W columns."""
    rows, columns = routes // W, routes % W
    right, down = columns[:, 1:] - columns[:, :-1], rows[:, 1:] - rows[:, :-1]
    return F.pad(torch.where(right != 0, 1 + (right < 0).int(), 3 + (down > 0).int()), (1, 0))


@register_notrace_module  # routes by the size of the map
class SnakeSS2D(nn.Module):
    """PlainMamba's mixer (arXiv 2403.17695), on (B, H, W, dim) of any H, W.

        u, gate = in_proj(x);    u = silu(conv(u));    out_proj(silu(gate) * sum of the scans of u along four snakes)

    The snakes go row by row and column by column, there and back, from either end, so that neighbouring steps are
    neighbouring tokens. They share all parameters; a learned vector for each direction of a step is added to its B.
    The operator is `visionbb.kernels.ss2d`.

    Args:
        d_state: N, numbers a channel's state is made of.
        expand: width of the scan over dim.
        kernel_size: of the depthwise convolution.
        permute: "u" as the released models have it: the snakes reorder the tokens' values, but a step takes its time
            step, B and C from the map in raster order; "all" as the paper has it: from the token that it visits.

    Raises:
        ValueError: another permute.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        expand: int = 2,
        kernel_size: int = 7,
        permute: str = "u",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if permute not in ("u", "all"):
            raise ValueError(f"permute must be 'u' or 'all', got {permute!r}")
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.d_state, self.rank = d_state, rank
        self.permute = permute
        self.routes = ["snake"]
        self.in_proj = Linear(dim, 2 * inner, **dd)
        self.conv = DepthwiseConv(inner, kernel_size, **dd)
        self.x_proj = Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Parameter(torch.empty(inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(inner, **dd))
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.direction_B = nn.Parameter(torch.empty(5, d_state, **dd))  # by `step_directions`
        self.out_proj = Linear(inner, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba: A = -1 .. -N, D = 1, time steps of 0.001 to 0.1."""
        bound = self.rank**-0.5
        nn.init.uniform_(self.dt_proj, -bound, bound)
        init_time_steps_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)
        trunc_normal_(self.direction_B, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "direction_B", "dt_bias"}

    def project(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """Time steps, B and C of all tokens for each of the routes, (B, H, W, K * (R + 2 N))."""
        _, H, W, _ = x.shape
        direction = step_directions(routes, W)
        if self.permute == "all":  # from the steps, in their order, to the tokens that they visit
            direction = direction.gather(1, routes.argsort(1))
        own_B = self.direction_B[direction].transpose(0, 1).unflatten(0, [H, W])  # (H, W, K, N)
        return (self.x_proj(x).unsqueeze(-2) + F.pad(own_B, (self.rank, self.d_state))).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv(x))
        # One set of parameters for all routes.
        dt_proj, dt_bias, A, D = self.dt_proj[None], self.dt_bias[None], -self.A_log.exp()[None], self.D[None]
        if torch.jit.is_scripting():
            routes = torch.ops.visionbb.scan_routes(self.routes, H, W, device=x.device)
            y = torch.ops.visionbb.ss2d(
                x, self.project(x, routes), dt_proj, dt_bias, A, D, routes, "sum", self.permute
            )
        else:
            routes = scan_routes(self.routes, H, W, device=x.device)
            y = ss2d(x, self.project(x, routes), dt_proj, dt_bias, A, D, routes, permute=self.permute)
        return self.out_proj(y.to(x.dtype) * F.silu(gate))
