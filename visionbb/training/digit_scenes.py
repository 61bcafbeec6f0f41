"""Scenes of handwritten digits, and single digits cut out of them.

Real digits (scikit-learn's, by `visionbb.training.digits`) of varied scale, slant and colour, overlapping, in dark ink
on cluttered paper. `visionbb.mm.digit_scenes` makes a data set for detection and segmentation of them.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .digits import DigitImages, Digits

MIN_VISIBLE = 0.75  # part of a digit's ink that later digits must leave uncovered
INK = 0.5  # opacity from which a pixel belongs to a digit


@dataclass(frozen=True)
class Scene:
    """image (S, S, 3) uint8; labels, one a digit; masks, one boolean (S, S) each, of what can be seen of it."""

    image: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]

    @property
    def classes(self) -> np.ndarray:
        """A class a pixel, (S, S) uint8: 0 is background, 1 + digit."""
        classes = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            classes[mask] = 1 + label
        return classes


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
    """Paper of slowly varying colour, crossed by lines and arcs."""
    coarse = rng.uniform(110, 230, 3) + rng.normal(0, 25, (4, 4, 3))
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
    """A colour darker than the ground, by half or more in each channel."""
    return ground * rng.uniform(0.0, 0.5, 3)


class DigitCutouts(DigitImages):
    """Single digits cut out of scenes: what a backbone learns from before it is to find them in whole scenes.

    Squares around every digit, 1.5 times as large as it, with clutter and neighbours; shifted where they would leave
    the canvas. Scenes of training digits are drawn for "train" (2,000, about 8,000 cutouts), of test digits for "test"
    (200), always the same ones. Items are `(image, target)`, as of `Digits`.

    Args:
        split, transform: as of `Digits`.
        input_img_mode: PIL mode of the images, "RGB" or "L".
        scenes: how many to draw instead.

    Raises:
        ValueError: an unknown split.
    """

    def __init__(
        self,
        split: str,
        input_img_mode: str = "RGB",
        transform: Callable[[Image.Image], Any] | None = None,
        scenes: int | None = None,
    ):
        digits = Digits(split)
        rng = np.random.default_rng([1, split == "train"])
        self.transform = transform
        self.images, self.targets = [], []
        for _ in range(scenes or (2000 if split == "train" else 200)):
            scene = draw_scene(digits, rng)
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                self.images.append(Image.fromarray(_square_around(mask, scene.image)).convert(input_img_mode))
                self.targets.append(label)


def _square_around(mask: np.ndarray, image: np.ndarray, margin: float = 1.5) -> np.ndarray:
    spans = [np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0)]
    side = min(round(margin * max(np.ptp(span) + 1 for span in spans)), len(image))
    top, left = (int(np.clip(round(span.mean() - side / 2), 0, len(image) - side)) for span in spans)
    return image[top : top + side, left : left + side]
