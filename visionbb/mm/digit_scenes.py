"""Scenes of handwritten digits: a small real data set for detection, instance and semantic segmentation.

`visionbb.training.digit_scenes` draws them. Training scenes hold training digits, validation scenes test digits. A few
hundred scenes are soon known by heart: `RedrawDigitScene` draws new ones while a segmentor trains.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image
from pycocotools import mask as rle

from ..registry import TRANSFORMS
from ..training.digit_scenes import draw_scene
from ..training.digits import Digits

CLASSES = Digits.classes
SPLITS = {"training": "train", "validation": "test"}  # ADE20K's names of the splits, and those of the digits

def write_digit_scenes(
    folder: Path, training: int = 400, validation: int = 100, size: int = 128, seed: int = 0
) -> None:
    """Writes the data set: one set of images, COCO's annotations and ADE20K's.

        images/{training,validation}/00000.jpg
        annotations/{training,validation}/00000.png         a class a pixel: 0 is background, 1 + digit
        annotations/instances_{training,validation}.json    COCO's boxes and masks, category ids 1 + digit

    Args:
        folder: where to; made if need be.
        training, validation: how many scenes.
        size: side of the canvases in pixels.
        seed: the same seed writes the same data set.

    Raises:
        ValueError: a count below 1, or canvases of fewer than 32 pixels.
    """
    if min(training, validation) < 1:
        raise ValueError(f"training and validation must be at least 1 scene, got {training} and {validation}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    for number, (split, count) in enumerate(zip(SPLITS, (training, validation), strict=True)):
        digits = Digits(SPLITS[split])
        rng = np.random.default_rng([seed, number])
        images, annotations = [], []
        for room in ("images", "annotations"):
            (folder / room / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = draw_scene(digits, rng, size)
            Image.fromarray(scene.image).save(folder / "images" / split / f"{i:05}.jpg", quality=80)
            images.append(dict(id=i, file_name=f"{i:05}.jpg", height=size, width=size))
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                annotations.append(_annotation(len(annotations) + 1, i, label, mask))
            Image.fromarray(scene.classes).save(folder / "annotations" / split / f"{i:05}.png", optimize=True)
        categories = [dict(id=1 + i, name=name) for i, name in enumerate(CLASSES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _annotation(number: int, image: int, label: int, mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    return dict(
        id=number,
        image_id=image,
        category_id=1 + label,
        bbox=[x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        area=int(mask.sum()),
        iscrowd=0,
        segmentation=dict(size=code["size"], counts=code["counts"].decode()),
    )


@TRANSFORMS.register_module()
class RedrawDigitScene(BaseTransform):
    """Puts a newly drawn scene of training digits in the place of the loaded one.

    Stands behind LoadImageFromFile and LoadAnnotations of mmsegmentation; the new scene has the loaded image's size.
    Numpy's global generator, which mmengine seeds, decides.
    """

    def __init__(self):
        self.digits = Digits(SPLITS["training"])

    def transform(self, results: dict) -> dict:
        rng = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002
        scene = draw_scene(self.digits, rng, size=results["img"].shape[0])
        results["img"] = scene.image[..., ::-1].copy()  # images are loaded as BGR
        results["gt_seg_map"] = scene.classes
        return results
