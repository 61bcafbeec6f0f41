"""Trained detectors and segmentors on image files, and pictures of what they find."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mmcv
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import VISUALIZERS
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image
from torch import Tensor, nn

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
    model: nn.Module,
    image: str | Path,
    found: BaseDataElement,
    out_file: str | Path,
    score_threshold: float = 0.3,
    scale: int = 1,
) -> None:
    """Writes the image with boxes and masks, or with the segmentation over it.

    Args:
        score_threshold: boxes below it are left out.
        scale: whole factor by which the picture is larger than the image, for small images; boxes then carry thinner
            lines and segmented regions their class.
    """
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "name": "draw", "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    segmented = model.cfg.default_scope == "mmseg"
    options = dict(with_labels=scale > 1) if segmented else dict(pred_score_thr=score_threshold)
    pixels = mmcv.imread(str(image), channel_order="rgb")
    if scale > 1:
        pixels, found = mmcv.imrescale(pixels, float(scale)), _enlarge(found, scale)
    visualizer.add_datasample(
        Path(image).name, pixels, found, draw_gt=False, show=False, out_file=str(out_file), **options
    )


def _enlarge(found: BaseDataElement, scale: int) -> BaseDataElement:
    """A copy of what was found, as if on an image `scale` times as large."""

    def grow(maps: Tensor) -> Tensor:
        return maps.repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    found = found.clone()
    if "pred_sem_seg" in found:
        found.pred_sem_seg = PixelData(data=grow(found.pred_sem_seg.data))
    if "pred_instances" in found:
        found.pred_instances.bboxes = found.pred_instances.bboxes * scale
        if "masks" in found.pred_instances:
            # Fields of instances cannot change shape but for the first axis; a new container has no such rule.
            fields = dict(found.pred_instances.items())
            found.pred_instances = InstanceData(**{**fields, "masks": grow(fields["masks"])})
    return found


def contact_sheet(images: Sequence[str | Path], results: Sequence[str | Path], out_file: str | Path) -> None:
    """Writes one picture of all images, side by side, each above its result and at its result's size."""
    pictures = [Image.open(result).convert("RGB") for result in results]
    gap = 4
    width = sum(picture.width + gap for picture in pictures) - gap
    sheet = Image.new("RGB", (width, 2 * max(picture.height for picture in pictures) + gap), "white")
    x = 0
    for image, picture in zip(images, pictures, strict=True):
        above = Image.open(image).convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
        sheet.paste(above, (x, 0))
        sheet.paste(picture, (x, sheet.height - picture.height))
        x += picture.width + gap
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_file)
