from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from visionbb.mm.digit_scenes import MIN_VISIBLE, draw_scene, write_digit_scenes
from visionbb.training.digits import Digits


def test_two_formats_of_the_same_scenes(scenes):
    """COCO's boxes enclose COCO's masks; ADE20K's map is their union, each pixel of its digit's class."""
    for split, count in (("training", 24), ("validation", 6)):
        coco = COCO(scenes / "annotations" / f"instances_{split}.json")
        assert len(coco.getImgIds()) == count
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == [str(digit) for digit in range(10)]
        for image in coco.loadImgs(coco.getImgIds()):
            pixels = Image.open(scenes / "images" / split / image["file_name"])
            assert pixels.size == (image["width"], image["height"]) == (128, 128)
            classes = np.zeros((128, 128), np.uint8)
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            assert 2 <= len(annotations) <= 6
            for annotation in annotations:
                mask = coco.annToMask(annotation).astype(bool)
                assert not classes[mask].any()  # what is covered belongs to the digit on top alone
                classes[mask] = annotation["category_id"]
                x, y, w, h = annotation["bbox"]
                assert mask.sum() == annotation["area"] == mask[y : y + h, x : x + w].sum()
                assert all(line.any() for line in (mask[y], mask[y + h - 1], mask[:, x], mask[:, x + w - 1]))
            stem = image["file_name"].removesuffix(".jpg")
            stored = np.asarray(Image.open(scenes / "annotations" / split / f"{stem}.png"))
            assert np.array_equal(stored, classes)


def test_scenes_vary_and_overlap():
    digits, rng = Digits("train"), np.random.default_rng(0)
    drawn = [draw_scene(digits, rng) for _ in range(20)]
    heights = [np.ptp(np.flatnonzero(mask.any(1))) + 1 for scene in drawn for mask in scene.masks]
    assert min(heights) < 30
    assert max(heights) > 50
    assert {label for scene in drawn for label in scene.labels} == set(range(10))
    assert all(mask.sum() > 30 * MIN_VISIBLE for scene in drawn for mask in scene.masks)


def test_seed_decides(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_digit_scenes(tmp_path / folder, training=2, validation=1, seed=seed)
    content = [json.loads((tmp_path / f / "annotations/instances_training.json").read_text()) for f in "abc"]
    assert content[0] == content[1] != content[2]
    images = [(tmp_path / f / "images/training/00001.jpg").read_bytes() for f in "ab"]
    assert images[0] == images[1]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least 1 scene, got 0 and 5"):
        write_digit_scenes(tmp_path, training=0, validation=5)
    with pytest.raises(ValueError, match="size must be at least 32 pixels, got 16"):
        write_digit_scenes(tmp_path, size=16)
