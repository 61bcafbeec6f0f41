"""Linear attention as a token mixer: a paper is a row of arguments."""

import torch
from timm.models import register_notrace_module

from ..kernels import Rotary, linear_attention
from .attention import GlobalAttention
from .feature_maps import POINTWISE, create_feature_map

KEY_WEIGHTS = ("", "global_query")
NORMALIZERS = ("div", "clamp", "additive", "none")


@register_notrace_module  # angles and means by the size of the map
class LinearAttention(GlobalAttention):
    """Multi-head linear attention in the frame of `GlobalAttention`, on (B, H, W, dim) of any H, W.

    The operator is `visionbb.kernels.linear_attention`; the rotary embedding turns the numerator alone.

    Args:
        feature_map: name of a map in `feature_maps.FEATURE_MAPS`.
        key_weight: "global_query": keys weighted by the softmax of their products with the mean query (RALA, arXiv
            2411.07635, equation 8); "": all alike.
        normalizer: "div", "clamp", "additive" (which scales queries by head_dim ** -0.5, as MALA does) or "none".
        eps: of the normalizer; for "clamp" the bound of the sum (L2ViT: 100).
        The rest is `GlobalAttention`'s.

    Raises:
        ValueError: an unknown name, or a shape that does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_map: str = "elu",
        key_weight: str = "",
        normalizer: str = "div",
        eps: float = 1e-6,
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
        super().__init__(
            dim, num_heads, rotary, local_kernel, share_local, gate, out_norm, value_proj, out_proj, qkv_bias,
            proj_drop, device=device, dtype=dtype,
        )
        if key_weight not in KEY_WEIGHTS:
            raise ValueError(f"key_weight must be one of {KEY_WEIGHTS}, got {key_weight!r}")
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {NORMALIZERS}, got {normalizer!r}")
        self.key_weight = key_weight
        self.normalizer = normalizer
        self.scale = self.head_dim**-0.5 if normalizer == "additive" else 1.0
        self.eps = eps
        # Pointwise maps are the operator's own, unless the weights of the keys need their values.
        self.pointwise = feature_map if feature_map in POINTWISE and not key_weight else "identity"
        self.feature_map = None
        if self.pointwise == "identity":
            self.feature_map = create_feature_map(feature_map, num_heads, self.head_dim, device=device, dtype=dtype)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        local: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.feature_map is not None:
            q, k = self.feature_map(q, k)
        weight: torch.Tensor | None = None
        if self.key_weight == "global_query":
            weight = global_query_weights(q, k, self.head_dim**-0.5)
        if torch.jit.is_scripting():
            return torch.ops.visionbb.linear_attention(
                q, k, v, weight, local, gate, self.pointwise, self.normalizer, self.scale, self.eps,
                self.rotary_span, self.rotary_ratio,
            )[0]
        else:
            return linear_attention(
                q, k, v, feature_map=self.pointwise, key_weight=weight, normalizer=self.normalizer,
                rotary=Rotary(self.rotary_span, self.rotary_ratio) if self.rotary_span else None,
                scale=self.scale, eps=self.eps, local=local, gate=gate,
            )


def global_query_weights(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax over the map of scale * mean(q) . k; q, k (B, H, W, heads, d) to (B, H, W, heads) in float32 at least."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.mean((1, 2), keepdim=True, dtype=wide) * scale
    logits = (query * k).sum(-1)
    return logits.flatten(1, 2).softmax(1).view(logits.shape)
