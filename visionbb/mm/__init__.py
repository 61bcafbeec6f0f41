"""Detection and segmentation: every backbone under the heads of mmdet and mmsegmentation.

A config needs one line besides its backbone's:

    custom_imports = dict(imports=["visionbb.mm"], allow_failed_imports=False)
    model = dict(backbone=dict(type="visionbb.TimmBackbone", model_name="nat_tiny"), ...)

Works with the onedl packages (the extra `visionbb[mm]`) and with the original OpenMMLab 2.x: import names decide. Where
mmcv came without its compiled ops, importing this package supplies those that detectors need, see `visionbb.mm.ops`.
"""
from __future__ import annotations

from . import _requirements  # noqa: F401  (comes first)
from .backbone import TimmBackbone
from .layer_decay import TimmLayerDecayConstructor
from .pyramid import SimpleFeaturePyramid
from .supply import supply_ops

supply_ops()

__all__ = ["SimpleFeaturePyramid", "TimmBackbone", "TimmLayerDecayConstructor", "supply_ops"]
