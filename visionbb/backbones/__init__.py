"""Skeletons that own timm's model contract, once for every family: four-stage `Pyramid`, ViT-shaped `Columnar`."""
from .backbone import Backbone, FeatureMaps, keep_native
from .block import Block, MixerBlock, TokenBlock
from .columnar import ClassTokenStem, Columnar, TokenColumnar
from .patches import PatchConv, PositionEmbed
from .pyramid import Pyramid

__all__ = [
    "Backbone", "Block", "ClassTokenStem", "Columnar", "FeatureMaps", "MixerBlock", "PatchConv", "PositionEmbed",
    "Pyramid", "TokenBlock", "TokenColumnar", "keep_native",
]
