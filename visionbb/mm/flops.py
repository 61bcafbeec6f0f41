"""FLOPs of a whole detector or segmentor, by the profiler's counter and convention."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.model import revert_sync_batchnorm
from rich.table import Table
from torch import Tensor, nn

from ..profiling.flops import FlopCount, count_flops
from ..profiling.output import table
from .config import build_model, load_config


class _Inference(nn.Module):
    """What a model computes for one image, with fixed numbers of boxes, so that no weights need to be there.

    RoI heads get as many boxes as the test settings let through: `rpn.max_per_img` for boxes (1000 as a rule),
    `rcnn.max_per_img` for masks (100), as the literature counts them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> None:
        model = self.model
        maps = model.extract_feat(images)
        if hasattr(model, "decode_head"):
            model.decode_head(maps)
        elif not hasattr(model, "roi_head"):
            model.bbox_head(maps)
        else:
            model.rpn_head(maps)
            roi, limits = model.roi_head, model.test_cfg
            _run_heads(roi.bbox_head, roi.bbox_roi_extractor, maps[0], limits.rpn.max_per_img)
            if roi.with_mask:
                _run_heads(roi.mask_head, roi.mask_roi_extractor, maps[0], limits.rcnn.max_per_img)


def _run_heads(heads: nn.Module, extractors: nn.Module, like: Tensor, boxes: int) -> None:
    """A RoI head, or each of a cascade's, on that many pooled boxes."""
    if not isinstance(heads, nn.ModuleList):
        heads, extractors = [heads], [extractors]
    for head, extractor in zip(heads, extractors, strict=True):
        head(like.new_empty(boxes, extractor.out_channels, *extractor.roi_layers[0].output_size))


def count_detector_flops(model: nn.Module, image_size: tuple[int, int]) -> FlopCount:
    """FLOPs of a detector or segmentor of mmdet or mmseg, for one image of (height, width); nothing is run.

    Auxiliary heads of training, RoIAlign and what comes after the heads (box decoding, NMS) count nothing.
    """
    return count_flops(_Inference(revert_sync_batchnorm(model)).eval(), (3, *image_size))


def config_flops(path: str | Path, image_size: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Part of the model in a config, "" for the whole: (parameters in 1e6, GMACs at an image of (height, width))."""
    with torch.device("meta"):
        model = build_model(load_config(path))
    count = count_detector_flops(model, image_size)
    children = {name: part for name, part in model.named_children() if next(part.parameters(), None) is not None}
    return {
        name: (
            sum(p.numel() for p in part.parameters()) / 1e6,
            _flops(part, f"model.{name}" if name else "", count.by_module) / 2e9,
        )
        for name, part in {"": model, **children}.items()
    }


def _flops(module: nn.Module, name: str, by_module: Mapping[str, int]) -> int:
    """FLOPs of a module, or of its children where only those were called."""
    if name in by_module:
        return by_module[name]
    return sum(_flops(child, f"{name}.{key}", by_module) for key, child in module.named_children())


def flops_table(paths: list[str | Path], image_size: tuple[int, int]) -> Table:
    """Parameters and GMACs of the models in configs, whole and by part."""
    rows = [
        (Path(path).stem, name or "whole", *numbers)
        for path in paths
        for name, numbers in config_flops(path, image_size).items()
    ]
    columns = {
        "config": lambda row: row[0] if row[1] == "whole" else "",
        "part": lambda row: row[1],
        "params M": lambda row: f"{row[2]:.2f}",
        "GMACs": lambda row: f"{row[3]:.1f}",
    }
    height, width = image_size
    caption = f"one image of {width}x{height}; 1 GMAC = 2 GFLOPs; heads at the most boxes that the test settings allow"
    return table("Detectors and segmentors", rows, columns, caption)
