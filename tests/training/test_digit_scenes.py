from __future__ import annotations

import numpy as np
import pytest

from visionbb.training.digit_scenes import INK, MIN_VISIBLE, DigitCutouts, draw_scene
from visionbb.training.digits import Digits


def test_scenes_vary_and_overlap():
    digits, rng = Digits("train"), np.random.default_rng(0)
    drawn = [draw_scene(digits, rng) for _ in range(20)]
    heights = [np.ptp(np.flatnonzero(mask.any(1))) + 1 for scene in drawn for mask in scene.masks]
    assert min(heights) < 30
    assert max(heights) > 50
    assert {label for scene in drawn for label in scene.labels} == set(range(10))
    assert all(mask.sum() > 30 * MIN_VISIBLE for scene in drawn for mask in scene.masks)


def test_ink_is_darker_than_the_paper_around_it():
    digits, rng = Digits("train"), np.random.default_rng(1)
    for scene in (draw_scene(digits, rng) for _ in range(10)):
        paper = scene.image[scene.classes == 0].mean()
        assert all(scene.image[mask].mean() < (1 - INK / 2) * paper for mask in scene.masks)


def test_classes_of_a_scene():
    scene = draw_scene(Digits("train"), np.random.default_rng(2))
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        assert bool((scene.classes[mask] == 1 + label).all())
    assert (scene.classes > 0).sum() == sum(mask.sum() for mask in scene.masks)


def test_cutouts():
    """Squares of every digit of the scenes, which are the same ones every time."""
    cutouts = DigitCutouts("test", scenes=12)
    assert 24 <= len(cutouts) == len(cutouts.targets) <= 72
    assert set(cutouts.targets) <= set(range(10))
    for image, target in (cutouts[i] for i in range(len(cutouts))):
        assert image.mode == "RGB"
        assert 20 <= image.width == image.height <= 128
        assert isinstance(target, int)
    again = DigitCutouts("test", "L", transform=np.asarray, scenes=12)
    assert again.targets == cutouts.targets
    assert np.array_equal(again[3][0], np.asarray(cutouts[3][0].convert("L")))
    assert DigitCutouts("train", scenes=12).targets != cutouts.targets
    with pytest.raises(ValueError, match="split"):
        DigitCutouts("nowhere", scenes=1)
