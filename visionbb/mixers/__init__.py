"""Token mixers: modules on (B, H, W, C), one file a kind."""
from .attention import GlobalAttention, RelativeAttention, SoftmaxAttention
from .conv import DepthwiseConv
from .linear_attention import LinearAttention
from .neighborhood import NeighborhoodAttention

__all__ = [
    "DepthwiseConv", "GlobalAttention", "LinearAttention", "NeighborhoodAttention", "RelativeAttention",
    "SoftmaxAttention",
]
