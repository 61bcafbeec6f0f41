"""Token mixers: modules on (B, H, W, C), one file a kind."""
from .attention import RelativeAttention
from .neighborhood import NeighborhoodAttention

__all__ = ["NeighborhoodAttention", "RelativeAttention"]
