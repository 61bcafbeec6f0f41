"""Trained detectors and segmentors on image files, and pictures of what they find."""
from __future__ import annotations

from pathlib import Path

import mmcv
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import VISUALIZERS
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement
from torch import nn

from .config import build_model


def load_model(config: Config, checkpoint: str | Path, device: str = "cpu") -> nn.Module:
    """The model of a config with the weights of a training run, in evaluation mode.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the checkpoint is of another model.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint {str(checkpoint)!r}")
    model = revert_sync_batchnorm(build_model(config))
    try:
        content = load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r} does not fit the config's model: {error}") from error
    model.dataset_meta = content.get("meta", {}).get("dataset_meta") or {}
    model.cfg = config
    return model.to(device).eval()


def predict(model: nn.Module, image: str | Path) -> BaseDataElement:
    """What a model of `load_model` finds on an image file: `pred_instances` (mmdet) or `pred_sem_seg` (mmseg)."""
    if model.cfg.default_scope == "mmseg":
        from mmseg.apis import inference_model

        return inference_model(model, str(image))
    from mmdet.apis import inference_detector

    return inference_detector(model, str(image))


def draw(
    model: nn.Module, image: str | Path, found: BaseDataElement, out_file: str | Path, score_threshold: float = 0.3
) -> None:
    """Writes the image with boxes and masks, or with the segmentation over it.

    Args:
        score_threshold: boxes below it are left out.
    """
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "name": "draw", "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    options = dict(with_labels=False) if model.cfg.default_scope == "mmseg" else dict(pred_score_thr=score_threshold)
    pixels = mmcv.imread(str(image), channel_order="rgb")
    visualizer.add_datasample(
        Path(image).name, pixels, found, draw_gt=False, show=False, out_file=str(out_file), **options
    )
