"""Skeletons that own timm's model contract, once for every family: four-stage `Pyramid`, ViT-shaped `Columnar`."""
from .backbone import Backbone, FeatureMaps, keep_native
from .block import Block
from .columnar import Columnar
from .pyramid import Pyramid

__all__ = ["Backbone", "Block", "Columnar", "FeatureMaps", "Pyramid", "keep_native"]
