"""Puts `visionbb.mm.ops` in the place of mmcv's compiled ops where those are absent."""
from __future__ import annotations

import importlib.util
import sys

from mmengine.logging import print_log

# mmdet guards its imports from mmcv.ops: without ops, these names stand for functions that only raise.
_GUARDED = {"batched_nms", "nms", "roi_align", "sigmoid_focal_loss"}


def supply_ops() -> bool:
    """Supplies `mmcv._ext` from torchvision if, and only if, mmcv has none; says so in one log line.

    Returns:
        Whether the stand-in serves in this process.
    """
    from . import ops

    if (present := sys.modules.get("mmcv._ext")) is not None:
        return present is ops
    if importlib.util.find_spec("mmcv._ext") is not None:
        return False
    sys.modules["mmcv._ext"] = ops
    _replace_guards()
    print_log(
        "mmcv has no compiled ops: NMS, RoIAlign and focal loss come from torchvision, by visionbb.mm. "
        f"To compile mmcv's own:\n    {ops.COMPILE}",
        logger="current",
    )
    return True


def _replace_guards() -> None:
    """Gives mmcv's functions to the modules of mmdet and mmseg that were imported before there were any."""
    import mmcv.ops

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("mmdet", "mmseg") or name.endswith(".clr_head"):  # whose "nms" is line_nms
            continue
        for attribute, value in list(vars(module).items()):
            function = attribute.lstrip("_")
            if function in _GUARDED and getattr(value, "__module__", None) == name:
                setattr(module, attribute, getattr(mmcv.ops, function))
