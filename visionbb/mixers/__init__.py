"""Token mixers: modules on (B, H, W, C), one file a kind."""
from .attention import GlobalAttention, RelativeAttention, SoftmaxAttention
from .conv import DepthwiseConv, SequenceConv
from .cross import BidirectionalCrossAttention, CrossAttention, PatchCrossAttention
from .landmarks import AgentAttention, GaussianAttention
from .linear_attention import LinearAttention
from .mamba import S6, BidirectionalMamba, LocalMamba, MambaVisionMixer
from .neighborhood import NeighborhoodAttention
from .rwkv import ChannelMix, SpatialMix
from .self_guided import HybridScaleAttention, LocalSumAttention, SelfGuidedAttention
from .snake import SnakeSS2D
from .state_space import SS2D, ChannelAttention, NonCausalSSD
from .window import ShiftedWindowAttention, WindowAttention

__all__ = [
    "S6", "SS2D", "AgentAttention", "BidirectionalCrossAttention", "BidirectionalMamba", "ChannelAttention",
    "ChannelMix", "CrossAttention", "DepthwiseConv", "GaussianAttention", "GlobalAttention", "HybridScaleAttention",
    "LinearAttention", "LocalMamba", "LocalSumAttention", "MambaVisionMixer", "NeighborhoodAttention", "NonCausalSSD",
    "PatchCrossAttention", "RelativeAttention", "SelfGuidedAttention", "SequenceConv", "ShiftedWindowAttention",
    "SnakeSS2D", "SoftmaxAttention", "SpatialMix", "WindowAttention",
]
