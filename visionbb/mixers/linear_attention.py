"""Linear attention as a token mixer: a paper is a row of arguments."""

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import register_notrace_module
from torch import nn

from ..kernels import Rotary, linear_attention
from .attention import GlobalAttention
from .feature_maps import POINTWISE, Polar, create_feature_map

KEY_WEIGHTS = ("", "global_query", "flow")
NORMALIZERS = ("div", "clamp", "additive", "none")


@register_notrace_module  # angles and means by the size of the map
class LinearAttention(GlobalAttention):
    """Multi-head linear attention in the frame of `GlobalAttention`, on (B, H, W, dim) of any H, W.

    The operator is `visionbb.kernels.linear_attention`; the rotary embedding turns the numerator alone.

    Args:
        feature_map: name of a map in `feature_maps.FEATURE_MAPS`.
        key_weight: "global_query": keys weighted by the softmax of their products with the mean query (RALA, arXiv
            2411.07635, equation 8); "flow": flow attention (arXiv 2202.06258), which weighs keys and queries so that
            the flow through each is conserved, and takes no normalizer but "none"; "": all alike.
        normalizer: "div", "clamp", "additive" (which scales queries by head_dim ** -0.5, as MALA does) or "none".
        eps: of the normalizer; for "clamp" the bound of the sum (L2ViT: 100).
        temperature: a learned gain a head on the numerator, head_dim ** -0.5 at first (L2ViT, arXiv 2501.16182); a
            weight like others, under weight decay as in the authors' code.
        key_pos_size: (rows, columns) of a position table added to the keys of a map before their features (FLatten,
            arXiv 2308.00442), zero at first; resampled (bicubic) to any other map; None for none.
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
        temperature: bool = False,
        key_pos_size: tuple[int, int] | None = None,
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
        if key_weight == "flow" and normalizer != "none":
            raise ValueError(f"normalizer must be 'none' with key_weight 'flow', got {normalizer!r}")
        self.key_weight = key_weight
        self.normalizer = normalizer
        self.scale = self.head_dim**-0.5 if normalizer == "additive" else 1.0
        self.eps = eps
        self.temperature = None
        if temperature:
            self.temperature = nn.Parameter(torch.empty(num_heads, 1, device=device, dtype=dtype))
        self.key_pos = None
        if key_pos_size is not None:
            self.key_pos = nn.Parameter(torch.empty(1, *key_pos_size, dim, device=device, dtype=dtype))
        # Pointwise maps are the operator's own, unless the weights of the keys need their values.
        self.pointwise = feature_map if feature_map in POINTWISE and not key_weight else "identity"
        self.feature_map = None
        if self.pointwise == "identity":
            self.feature_map = create_feature_map(feature_map, num_heads, self.head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.temperature is not None:
            nn.init.constant_(self.temperature, self.head_dim**-0.5)
        if self.key_pos is not None:
            nn.init.zeros_(self.key_pos)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"key_pos"}

    def keys(self, k: torch.Tensor, H: int, W: int) -> torch.Tensor:
        if self.key_pos is None:
            return k
        pos = resample_abs_pos_embed_nhwc(self.key_pos, (H, W)).to(k.dtype)
        prefix = k.shape[1] * k.shape[2] - H * W  # tokens without a position
        return k + F.pad(pos.flatten(1, 2), (0, 0, prefix, 0)).view(1, k.shape[1], k.shape[2], -1)

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
        if self.feature_map is not None:
            q, k = self.feature_map(q, k)
        weight: torch.Tensor | None = None
        if self.key_weight == "global_query":
            weight = global_query_weights(q, k, self.head_dim**-0.5)
        elif self.key_weight == "flow":
            weight, share = flow_weights(q, k)
            # A factor of each query is a gate whose channels are alike; what else there is comes after it.
            y = self.summed(q, k, v, weight, None, share[..., None].to(v.dtype).expand_as(v))
            if local is not None:
                y = y + local
            return y if gate is None else y * gate
        return self.summed(q, k, v, weight, local, gate)

    def attention_map(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        if isinstance(self.feature_map, Polar):
            raise ValueError("feature_map 'polar' has no one attention map a head: each half of the values has its own")
        return super().attention_map(x, H, W)

    def summed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor | None,
        local: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """The operator on features, or on raw q and k."""
        if self.temperature is not None:
            v = v * self.temperature.to(v.dtype)
        shape = v.shape
        if q.shape[3] != shape[3]:  # the feature map has split the heads (PolaFormer), so that their values are too
            v = regrouped(v, q.shape[3])
            if local is not None:
                local = regrouped(local, q.shape[3])
            if gate is not None:
                gate = regrouped(gate, q.shape[3])
        if torch.jit.is_scripting():
            y = torch.ops.visionbb.linear_attention(
                q, k, v, weight, local, gate, self.pointwise, self.normalizer, self.scale, self.eps,
                self.rotary_span, self.rotary_ratio,
            )[0]
        else:
            y = linear_attention(
                q, k, v, feature_map=self.pointwise, key_weight=weight, normalizer=self.normalizer,
                rotary=Rotary(self.rotary_span, self.rotary_ratio) if self.rotary_span else None,
                scale=self.scale, eps=self.eps, local=local, gate=gate,
            )
        return y.reshape(shape)


def regrouped(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The channels of (B, H, W, h, d) in another number of heads."""
    return x.flatten(3).unflatten(-1, (heads, -1))


def global_query_weights(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax over the map of scale * mean(q) . k; q, k (B, H, W, heads, d) to (B, H, W, heads) in float32 at least."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.mean((1, 2), keepdim=True, dtype=wide) * scale
    logits = (query * k).sum(-1)
    return logits.flatten(1, 2).softmax(1).view(logits.shape)


def flow_weights(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow attention's weights of keys and of queries, from features q, k (B, H, W, heads, d), in float32 at least.

    With the flow into a query I_i = q_i . sum_j k_j and out of a key O_j = k_j . sum_i q_i, each is divided by its own
    flow, so that Q_i = q_i . sum_j k_j / O_j and K_j = k_j . sum_i q_i / I_i are what it gets from the others'
    (Flowformer, arXiv 2202.06258, equations 4 to 8).

    Returns:
        softmax_j(K_j), keys' competition, with K clamped to +-1 for stability as in the authors' code; and N
        sigmoid(Q_i) / I_i, the queries' allocation over their normalizer; both (B, H, W, heads).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), k.to(wide)
    incoming, outgoing = flow(q, k.sum((1, 2))), flow(k, q.sum((1, 2)))
    query = flow(q, (k / outgoing[..., None]).sum((1, 2)))
    key = flow(k, (q / incoming[..., None]).sum((1, 2))).clamp(-1.0, 1.0)
    N = q.shape[1] * q.shape[2]
    return key.flatten(1, 2).softmax(1).view(key.shape), query.sigmoid() * N / incoming


def flow(x: torch.Tensor, total: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(x + eps) . (total + eps) + eps of x (B, H, W, heads, d) and total (B, heads, d), without adding to all of x."""
    total = total[:, None, None] + eps
    return (x * total).sum(-1) + eps * (total.sum(-1) + 1)
