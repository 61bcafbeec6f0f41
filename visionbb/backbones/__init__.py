"""Skeletons that own timm's model contract, once for every family: four-stage `Pyramid`, ViT-shaped `Columnar`."""
from .backbone import Backbone, FeatureMaps, keep_native, renamed
from .block import Block, MixerBlock, StreamNorm, TokenBlock, TokenMixerBlock
from .columnar import ClassTokenStem, Columnar, TokenColumnar, fold_class_position
from .patches import PatchConv, PositionEmbed
from .pyramid import Pyramid, Stage

__all__ = [
    "Backbone", "Block", "ClassTokenStem", "Columnar", "FeatureMaps", "MixerBlock", "PatchConv", "PositionEmbed",
    "Pyramid", "Stage", "StreamNorm", "TokenBlock", "TokenColumnar", "TokenMixerBlock", "fold_class_position",
    "keep_native",
    "renamed",
]
