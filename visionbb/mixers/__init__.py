"""Token mixers: modules on (B, H, W, C), one file a kind."""
from .attention import GlobalAttention, RelativeAttention, SoftmaxAttention
from .conv import DepthwiseConv
from .landmarks import AgentAttention, GaussianAttention
from .linear_attention import LinearAttention
from .neighborhood import NeighborhoodAttention
from .state_space import SS2D, NonCausalSSD
from .window import WindowAttention

__all__ = [
    "SS2D", "AgentAttention", "DepthwiseConv", "GaussianAttention", "GlobalAttention", "LinearAttention",
    "NeighborhoodAttention", "NonCausalSSD", "RelativeAttention", "SoftmaxAttention", "WindowAttention",
]
