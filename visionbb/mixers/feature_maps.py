"""Feature maps of linear attention: modules from q, k (B, H, W, heads, head_dim) to their features."""

import torch
from torch import nn

POINTWISE = ("elu", "relu", "exp")  # those that `visionbb.kernels.linear_attention` computes itself


class Pointwise(nn.Module):
    """ELU + 1 (Katharopoulos et al., arXiv 2006.16236), ReLU or exp, of every channel."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def map(self, x: torch.Tensor) -> torch.Tensor:
        if self.name == "elu":  # by exp2 of x log2(e), which a CPU computes several times faster than expm1
            return (x.clamp(max=0.0) * 1.4426950408889634).exp2() + x.relu()
        return x.exp() if self.name == "exp" else x.relu()

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.map(q), self.map(k)

    def extra_repr(self) -> str:
        return self.name


class NormAware(nn.Module):
    """The norm of a query sharpens its directions (NaLaFormer, arXiv 2506.21137).

    Positive and negative parts are features of their own: of q's direction to a power that grows with q's norm, and of
    the cube of k. A query of zeros has no direction; its features are zero. In float32 at least: cubes are large.
    """

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        norm = q.norm(2, dim=-1, keepdim=True)
        direction = q / norm.clamp(min=1e-20)
        power = 3 * (0.5 + norm.tanh())
        return signed_parts(direction) ** power, signed_parts(k**3)


def signed_parts(x: torch.Tensor) -> torch.Tensor:
    """(..., d) to its positive and its negated negative part, (..., 2 d)."""
    return torch.cat((x, -x), -1).relu()


def create_feature_map(name: str, num_heads: int, head_dim: int, device=None, dtype=None) -> nn.Module:
    """A feature map by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name in POINTWISE:
        return Pointwise(name)
    if name == "norm_aware":
        return NormAware()
    raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {name!r}")


FEATURE_MAPS = (*POINTWISE, "norm_aware")
