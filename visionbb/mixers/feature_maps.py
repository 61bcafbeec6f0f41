"""Feature maps of linear attention: modules from q, k (B, H, W, heads, head_dim) to their features."""

import torch
import torch.nn.functional as F
from torch import nn

POINTWISE = ("elu", "relu", "exp")  # those that `visionbb.kernels.linear_attention` computes itself


class Pointwise(nn.Module):
    """ELU + 1 (Katharopoulos et al., arXiv 2006.16236), ReLU, exp or sigmoid (Flowformer), of every channel."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def map(self, x: torch.Tensor) -> torch.Tensor:
        if self.name == "elu":  # by exp2 of x log2(e), which a CPU computes several times faster than expm1
            return (x.clamp(max=0.0) * 1.4426950408889634).exp2() + x.relu()
        if self.name == "sigmoid":
            return x.sigmoid()
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


class Hedgehog(nn.Module):
    """softmax(x W) and softmax(-x W) over the channels of a head, 2 d features (arXiv 2402.04347, section 4.2).

    A matrix W a head for queries and one for keys, (num_heads, d, d), which start as the identity and learn to imitate
    softmax attention. Each half is normalised alone, as in LoLCATs.
    """

    def __init__(self, num_heads: int, head_dim: int, device=None, dtype=None):
        super().__init__()
        self.q_weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, device=device, dtype=dtype))
        self.k_weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for weight in (self.q_weight, self.k_weight):
                weight.zero_().diagonal(dim1=1, dim2=2).fill_(1.0)

    def map(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("...nd,nde->...ne", x, weight)
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.map(q, self.q_weight), self.map(k, self.k_weight)


class Focused(nn.Module):
    """Directions sharpened by a power, lengths kept: |x| x^p / |x^p| (FLatten, arXiv 2308.00442, section 3.2).

    Of x = (relu(x) + 1e-6) / softplus(scale), with norms over the channels of all heads, as in the authors' code;
    `scale` (num_heads, d) starts at zero. In float32 at least, and from the direction, so that no power leaves the
    range.
    """

    def __init__(self, num_heads: int, head_dim: int, power: float = 3.0, device=None, dtype=None):
        super().__init__()
        self.power = power
        self.scale = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)

    def map(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = (x.to(torch.promote_types(x.dtype, torch.float32)).relu() + 1e-6) / scale
        length = x.norm(2, dim=(-2, -1), keepdim=True)
        focused = (x / length) ** self.power
        return focused * (length / focused.norm(2, dim=(-2, -1), keepdim=True))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = F.softplus(self.scale.to(torch.promote_types(q.dtype, torch.float32)))
        return self.map(q, scale), self.map(k, scale)

    def extra_repr(self) -> str:
        return f"power={self.power}"


class Polar(nn.Module):
    """Polarity-aware attention (PolaFormer, arXiv 2501.15061, section 4): a head becomes two, each of half the values.

    Positive and negative parts of x / softplus(scale), to learned powers 1 + alpha sigmoid(power), are features of
    their own, (B, H, W, 2 num_heads, 2 d). In the first of the two heads parts of the same sign meet, which sum up the
    first half of a head's values; in the second, where q's parts change places, those of opposite signs sum up the
    other half. `scale` and `power` (num_heads, d) start at zero. In float32 at least.

    Raises:
        ValueError: head_dim is odd.
    """

    def __init__(self, num_heads: int, head_dim: int, alpha: float = 4.0, device=None, dtype=None):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for feature_map 'polar', which halves the values, got {head_dim}")
        self.alpha = alpha
        self.scale = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.power = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.power)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        scale, power = F.softplus(self.scale.to(wide)), 1 + self.alpha * self.power.to(wide).sigmoid()
        q, k = q.to(wide) / scale, k.to(wide) / scale
        power = torch.cat((power, power), -1)
        same, opposite = signed_parts(q) ** power, signed_parts(-q) ** power
        k = signed_parts(k) ** power
        return torch.stack((same, opposite), 4).flatten(3, 4), torch.stack((k, k), 4).flatten(3, 4)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def signed_parts(x: torch.Tensor) -> torch.Tensor:
    """(..., d) to its positive and its negated negative part, (..., 2 d)."""
    return torch.cat((x, -x), -1).relu()


def create_feature_map(name: str, num_heads: int, head_dim: int, device=None, dtype=None) -> nn.Module:
    """A feature map by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name in (*POINTWISE, "sigmoid"):
        return Pointwise(name)
    if name == "norm_aware":
        return NormAware()
    if name == "hedgehog":
        return Hedgehog(num_heads, head_dim, device=device, dtype=dtype)
    if name == "focused":
        return Focused(num_heads, head_dim, device=device, dtype=dtype)
    if name == "polar":
        return Polar(num_heads, head_dim, device=device, dtype=dtype)
    raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {name!r}")


FEATURE_MAPS = (*POINTWISE, "sigmoid", "norm_aware", "hedgehog", "focused", "polar")
