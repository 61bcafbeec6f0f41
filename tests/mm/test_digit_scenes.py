from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from visionbb.mm.digit_scenes import RedrawDigitScene, write_digit_scenes
from visionbb.training.digit_scenes import draw_scene
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


def test_redrawn_scenes():
    """New scenes of the loaded size, blue first as mmcv loads images, new each time, the same after the same seed."""
    loaded = dict(img=np.zeros((96, 96, 3), np.uint8), gt_seg_map=np.full((96, 96), 7, np.uint8))
    redraw = RedrawDigitScene()
    assert redraw.digits.indices.tolist() == Digits("train").indices.tolist()
    np.random.seed(3)  # noqa: NPY002
    first, second = (redraw({**loaded}) for _ in range(2))
    np.random.seed(3)  # noqa: NPY002
    again = redraw({**loaded})
    assert first["img"].shape == (96, 96, 3)
    assert first["gt_seg_map"].shape == (96, 96)
    assert {0} < set(np.unique(first["gt_seg_map"])) <= set(range(11))
    assert not np.array_equal(first["img"], second["img"])
    assert np.array_equal(first["img"], again["img"])

    np.random.seed(3)  # noqa: NPY002
    scene = draw_scene(redraw.digits, np.random.default_rng(np.random.randint(2**31)), 96)  # noqa: NPY002
    assert np.array_equal(first["img"], scene.image[..., ::-1])
    assert np.array_equal(first["gt_seg_map"], scene.classes)
