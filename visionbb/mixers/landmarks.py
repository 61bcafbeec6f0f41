"""Attention by way of a few landmarks: Gaussian kernels through their inverse (SOFT), softmaxes through agents."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from ..kernels import dwconv2d
from .attention import GlobalAttention
from .dropout import Dropout
from .linear import Linear


@register_notrace_module  # pads by the size of the map; leaves autocast
class GaussianAttention(nn.Module):
    """Softmax-free attention by Nystrom's method, on (B, H, W, dim) of any H, W.

    The kernel of two tokens is exp(-|q_i - q_j|^2 / 2), keys being the queries themselves. With landmarks l, patches of
    the map of queries under a convolution, a norm and GELU, the N x N matrix of a head is taken to be
    K(q, l) K(l, l)^-1 K(l, q), and a depthwise convolution of v is added to the result:

        SOFT, arXiv 2110.11945, equations 6 to 12;    `normalized`: arXiv 2207.03341, section 3.4, D^-1/2 . D^-1/2
        around the inverse, where D holds the sums of the rows of K(l, l).

    A patch is `ratio` tokens a side, so that there are N / ratio^2 landmarks: the cost grows with N^2 / ratio^2, that
    of the inverse with the cube of their number. Tokens beyond the last whole patch belong to no landmark; a map that
    is smaller than one is zero-padded to one. Kernels and inverse are in float32 at least, outside of autocast.

    Args:
        num_heads: must divide dim; all share the landmarks' convolution.
        ratio: side of a patch.
        local_kernel: side of the convolution of v, odd; one kernel for all channels of a head.
        normalized: as above.
        iterations: of Newton's method, see `newton_inverse`.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads, ratio below 1 or local_kernel even.
    """

    in_proj, projections = "qv", ("q", "v")  # as in `GlobalAttention`

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: int,
        local_kernel: int = 3,
        normalized: bool = False,
        iterations: int = 20,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {ratio}")
        if local_kernel % 2 == 0:
            raise ValueError(f"local_kernel must be odd, got {local_kernel}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.ratio = ratio
        self.normalized = normalized
        self.iterations = iterations
        self.qv = Linear(dim, 2 * dim, **dd)
        self.landmarks = nn.Conv2d(self.head_dim, self.head_dim, ratio, ratio, bias=False, **dd)
        self.norm = LayerNorm(self.head_dim, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.local = nn.Parameter(torch.empty(num_heads, 1, local_kernel, local_kernel, **dd))
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv2d`: uniform in +-1 / side."""
        bound = 1 / self.local.shape[-1]
        nn.init.uniform_(self.local, -bound, bound)

    def pooled(self, q: torch.Tensor) -> torch.Tensor:
        """Landmarks (B, heads, m, head_dim) of queries (B, heads, H, W, head_dim)."""
        q = q.permute(0, 1, 4, 2, 3).flatten(0, 1)
        rows, cols = self.ratio - q.shape[2], self.ratio - q.shape[3]
        if rows > 0 or cols > 0:
            q = F.pad(q, (0, max(cols, 0), 0, max(rows, 0)))
        x = self.landmarks(q).flatten(2).transpose(1, 2)
        return self.act(self.norm(x)).unflatten(0, (-1, self.num_heads))

    def attend(self, q: torch.Tensor, landmarks: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, v (B, heads, N, head_dim) and landmarks (B, heads, m, head_dim), to q's shape."""
        to_landmarks, among = gaussian_kernel(q, landmarks), gaussian_kernel(landmarks, landmarks)
        if self.normalized:
            inverse = newton_inverse(among, normalized_start(among), self.iterations)
            root = among.sum(-1, keepdim=True).rsqrt()
            inverse = root * inverse * root.transpose(-2, -1)
        else:
            start = 1.8 / among.sum(-1).amax(-1)[..., None, None].square()
            jitter = 0.01 * torch.eye(among.shape[-1], dtype=among.dtype, device=among.device)
            inverse = newton_inverse(among + jitter, start, self.iterations)
        return to_landmarks @ (inverse @ (to_landmarks.transpose(-2, -1) @ v))

    @torch.jit.ignore
    def begin_plain(self) -> None:
        """No local convolution, and landmarks of the means of their patches, but for the norm and GELU."""
        with torch.no_grad():
            self.local.zero_()
            self.landmarks.weight.zero_().diagonal().fill_(self.ratio**-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x.flatten(1, 2), x.shape[1], x.shape[2]).unflatten(1, x.shape[1:3])

    def forward_tokens(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """On a sequence (B, P + H * W, dim), prefix tokens first.

        Their kernels with the landmarks count like all others'; no landmark is made of them, and the convolution
        leaves them out.
        """
        return self.mix(x, H, W)

    def mix(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        q, v = self.qv(x).chunk(2, -1)
        prefix = x.shape[1] - H * W
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        heads = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) * self.head_dim**-0.25
        landmarks = self.pooled(heads[:, :, prefix:].unflatten(2, (H, W))).to(wide)
        queries = heads.to(wide)
        values = v.to(wide).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        patches = v[:, prefix:].unflatten(1, (H, W))
        kernel = self.local.repeat_interleave(self.head_dim, 0)
        if torch.jit.is_scripting():
            y = self.attend(queries, landmarks, values)
            local = torch.ops.visionbb.dwconv2d(patches, kernel.to(v.dtype), None, 1, False)
        else:
            with outside_autocast(x.device.type):
                y = self.attend(queries, landmarks, values)
            local = dwconv2d(patches, kernel)
        local = local.flatten(1, 2)
        if prefix > 0:
            local = F.pad(local, (0, 0, prefix, 0))
        y = y.transpose(1, 2).reshape(v.shape).to(v.dtype)
        return self.proj_drop(self.proj(y + local))


def outside_autocast(device: str) -> AbstractContextManager:
    """A block of code whose matrix products keep the dtype of their inputs."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def gaussian_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp(-|a_i - b_j|^2 / 2) of a (..., n, d) and b (..., m, d), to (..., n, m)."""
    products = a @ b.transpose(-2, -1)
    half = 0.5 * a.square().sum(-1)[..., :, None]
    return products.sub_(half).sub_(0.5 * b.square().sum(-1)[..., None, :]).exp_()


def newton_inverse(matrix: torch.Tensor, start: torch.Tensor, iterations: int) -> torch.Tensor:
    """The inverse of (B, heads, m, m), by Newton's method V <- 2 V - V M V from V = start * M.

    The iterations are products of matrices and nothing else: the host never waits for a GPU. In the directions of the
    smallest eigenvalues, where they have not converged, they give a smooth pseudo-inverse. The gradient is that of the
    inverse at the last V, -V^T G V^T: the iterations are not differentiated, and nothing is kept of them.
    """
    with torch.no_grad():
        m = matrix.detach().flatten(0, 1)
        inverse = (matrix * start).flatten(0, 1)
        for _ in range(iterations):
            inverse = torch.baddbmm(inverse, inverse @ m, inverse, beta=2.0, alpha=-1.0)
        inverse = inverse.view(matrix.shape)
    if matrix.requires_grad:  # minus zero, whose gradient is the one above
        inverse = inverse - inverse @ (matrix - matrix.detach()) @ inverse
    return inverse


def normalized_start(matrix: torch.Tensor) -> torch.Tensor:
    """The start of SOFT's normalized form, (B, 1, 1, 1), for symmetric, positive matrices M (B, heads, m, m).

    It is 2 / (largest sum of a row)^2, halved until the 1-norm of I - start * M^2 is at most 1.01, ten times at most.
    The authors' code does so in a loop that waits for the GPU, once for all of a batch; here every image has a start of
    its own. The norm is convex in the start, and 1 at 0: of ten halvings the first are too large, so that their number
    is how many are to be made. As all entries are positive, it follows from the diagonal and the sums of M^2.
    """
    with torch.no_grad():
        start = 2 / matrix.sum(-1).amax((1, 2))[:, None].square()
        starts = start * 0.5 ** torch.arange(10, dtype=matrix.dtype, device=matrix.device)
        squared = matrix @ matrix
        diagonal = squared.diagonal(dim1=-2, dim2=-1)[..., None]
        steps = starts[:, None, None]
        norms = (1 - steps * diagonal).abs() + steps * (squared.sum(-1)[..., None] - diagonal)
        halvings = (norms.amax((1, 2)) > 1.01).sum(-1, keepdim=True)
        return (start * 0.5**halvings)[..., None, None]


@register_notrace_module  # biases by the size of the map
class AgentAttention(GlobalAttention):
    """Agent attention (arXiv 2312.08874) in the frame of `GlobalAttention`, on (B, H, W, dim) of any H, W.

    Agents, queries averaged over the cells of a grid, collect the values by a softmax over all keys, and hand them out
    by a softmax over agents: two attentions whose cost is linear in the map. A depthwise convolution of v is added.

    Args:
        num_agents: a square number.
        map_size: (rows, columns) of the map that position biases are learned at; they are resampled (bilinear) to any
            other. Their parts: a 7x7 table for each agent, and a row and a column of the map for each. None: no biases.
        prefix_tokens: in `forward_tokens`, as many as have biases of their own: the class token of Agent-DeiT. They
            attend like all others, but no agent is made of them.
        local_kernel: side of the convolution of v; 0 for none.
        qkv_bias, proj_drop: `GlobalAttention`'s.

    Raises:
        ValueError: num_agents is no square, or dim no multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int = 49,
        map_size: tuple[int, int] | None = (14, 14),
        prefix_tokens: int = 0,
        local_kernel: int = 3,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, local_kernel=local_kernel, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
        self.side = round(num_agents**0.5)
        if self.side**2 != num_agents or num_agents < 1:
            raise ValueError(f"num_agents must be a square number, got {num_agents}")
        self.prefix_tokens = prefix_tokens
        self.biases = None
        if map_size is not None:
            self.biases = nn.ModuleList(
                AgentBias(num_heads, num_agents, map_size, prefix_tokens, **dd) for _ in range(2)
            )

    @torch.jit.ignore
    def begin_plain(self) -> None:
        super().begin_plain()
        if self.biases is not None:
            for p in self.biases.parameters():
                nn.init.zeros_(p)

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
        prefix = q.shape[1] * q.shape[2] - H * W
        if self.biases is not None and prefix != self.prefix_tokens:
            raise ValueError(f"a map must follow {self.prefix_tokens} prefix tokens, which have biases, got {prefix}")
        agents = q.flatten(1, 2)[:, prefix:].flatten(2).transpose(1, 2).unflatten(2, (H, W))
        agents = F.adaptive_avg_pool2d(agents, self.side)
        agents = agents.flatten(2).transpose(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        collect: torch.Tensor | None = None
        hand_out: torch.Tensor | None = None
        if self.biases is not None:
            collect = self.biases[0](H, W).to(q.dtype)
            hand_out = self.biases[1](H, W).transpose(1, 2).to(q.dtype)
        queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        collected = F.scaled_dot_product_attention(agents, keys, values, attn_mask=collect)
        y = F.scaled_dot_product_attention(queries, agents, collected, attn_mask=hand_out)
        y = y.transpose(1, 2).reshape(v.shape)
        if local is not None:
            y = y + local
        return y if gate is None else y * gate


class AgentBias(nn.Module):
    """Position biases of the tokens of a map for every agent: a coarse table, a row and a column, added up.

    Prefix tokens, which have no place on the map, have one bias each.
    """

    def __init__(
        self,
        num_heads: int,
        num_agents: int,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.table = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7, **dd))
        self.rows = nn.Parameter(torch.empty(num_heads, num_agents, map_size[0], 1, **dd))
        self.cols = nn.Parameter(torch.empty(num_heads, num_agents, 1, map_size[1], **dd))
        self.prefix = None
        if prefix_tokens:
            self.prefix = nn.Parameter(torch.empty(num_heads, num_agents, prefix_tokens, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            trunc_normal_(p, std=0.02)

    def forward(self, H: int, W: int) -> torch.Tensor:
        """(heads, agents, prefix tokens + H * W)"""
        bias = (resized(self.table, H, W) + resized(self.rows, H, 1) + resized(self.cols, 1, W)).flatten(2)
        return bias if self.prefix is None else torch.cat((self.prefix, bias), 2)


def resized(x: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """(heads, agents, rows, columns) at another size, bilinear."""
    if x.shape[2] == H and x.shape[3] == W:
        return x
    return F.interpolate(x.float(), size=[H, W], mode="bilinear", align_corners=False).to(x.dtype)
