"""Scenes of handwritten digits: a small real data set for detection, instance and semantic segmentation.

Real digits (scikit-learn's, by `visionbb.training.digits`) of varied scale, slant and colour, overlapping, on cluttered
canvases. Training scenes hold training digits, validation scenes test digits.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from ..training.digits import Digits

CLASSES = Digits.classes
SPLITS = {"training": "train", "validation": "test"}  # ADE20K's names of the splits, and those of the digits
MIN_VISIBLE = 0.6  # part of a digit's ink that later digits must leave uncovered
INK = 0.5  # opacity from which a pixel belongs to a digit


@dataclass(frozen=True)
class Scene:
    """image (S, S, 3) uint8; labels, one a digit; masks, one boolean (S, S) each, of what can be seen of it."""

    image: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]


def draw_scene(digits: Digits, rng: np.random.Generator, size: int = 128, most: int = 6) -> Scene:
    """One canvas of `size` pixels a side with two to `most` digits, 0.2 to 0.5 of the canvas high."""
    canvas = _background(rng, size)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []
    wanted = rng.integers(2, most + 1)
    for _ in range(4 * wanted):
        if len(labels) == wanted:
            break
        index = int(rng.integers(len(digits)))
        alpha = _placed(digits.images[index], rng, size)
        ink = alpha > INK
        left = [mask & ~ink for mask in masks]
        if any(mask.sum() < MIN_VISIBLE * area for mask, area in zip(left, areas, strict=True)):
            continue
        masks = [*left, ink]
        areas.append(int(ink.sum()))
        labels.append(digits.targets[index])
        canvas = canvas + alpha[..., None] * (_ink_colour(canvas[ink].mean(0), rng) - canvas)
    canvas = canvas + rng.normal(0, 4, canvas.shape)
    return Scene(canvas.clip(0, 255).astype(np.uint8), labels, masks)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Slowly varying colour, crossed by lines and arcs."""
    coarse = rng.uniform(60, 200, 3) + rng.normal(0, 25, (4, 4, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 9)):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        box = rng.uniform(-0.2, 1.2, 4) * size
        if rng.random() < 0.5:
            draw.line(box.tolist(), fill=colour, width=int(rng.integers(1, 4)))
        else:
            start = rng.uniform(0, 360)
            corners = [*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])]
            draw.arc(corners, start, start + rng.uniform(40, 200), fill=colour, width=int(rng.integers(1, 4)))
    return np.asarray(image, dtype=np.float64)


def _placed(digit: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """Opacity (size, size) of a digit, scaled, turned by up to 15 degrees, and wholly on the canvas."""
    height = round(size * 0.2 * 2.5 ** rng.random())
    width = round(height * rng.uniform(0.7, 1.0))
    glyph = digit.resize((width, height), Image.Resampling.BICUBIC)
    angle = rng.uniform(-15, 15)
    glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    sheet = Image.new("L", (size, size))
    sheet.paste(glyph, tuple(int(rng.integers(0, size - side + 1)) for side in glyph.size))
    # The scans are of low resolution: a steeper slope around the edge gives crisp strokes at any scale.
    ink = np.asarray(sheet, dtype=np.float64) / 255
    return ((ink - 0.35) * height / 8 + 0.5).clip(0, 1)


def _ink_colour(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that stands out from the ground: lighter or darker, by half of what there is room for or more."""
    towards = np.where(rng.random() < ground.mean() / 255, 0.0, 255.0)
    return ground + rng.uniform(0.5, 1.0, 3) * (towards - ground)


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
            classes = np.zeros((size, size), np.uint8)
            images.append(dict(id=i, file_name=f"{i:05}.jpg", height=size, width=size))
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                classes[mask] = 1 + label
                annotations.append(_annotation(len(annotations) + 1, i, label, mask))
            Image.fromarray(classes).save(folder / "annotations" / split / f"{i:05}.png", optimize=True)
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
