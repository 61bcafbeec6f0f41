"""Says what to install, before any other module of this package fails without it."""
from __future__ import annotations

from importlib.util import find_spec

if _missing := [name for name in ("mmengine", "mmcv") if find_spec(name) is None]:
    raise ImportError(
        f"visionbb.mm needs {' and '.join(_missing)}, not installed. Detection and segmentation are optional:\n"
        "    pip install 'visionbb[mm]'\n"
        "or bring your own OpenMMLab 2.x (mmengine>=0.10, mmcv>=2.0, mmdet>=3.0, mmsegmentation>=1.0). "
        "Classification models (timm.create_model) work without it."
    )
