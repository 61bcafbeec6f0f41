from __future__ import annotations

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest

from visionbb.training import Digits

pytest.importorskip("sklearn")


def test_split_is_fixed_disjoint_and_complete() -> None:
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train.indices, *test.indices]) == list(range(1797))
    assert Digits("validation").indices.tolist() == test.indices.tolist()
    digest = hashlib.sha256(np.sort(test.indices).astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("2fbaae31b8c6"), "the held-out images are others than those of published results"


def test_split_is_stratified() -> None:
    train, test = (Counter(Digits(split).targets) for split in ("train", "test"))
    for digit in range(10):
        share = test[digit] / (test[digit] + train[digit])
        assert abs(share - 0.2) < 0.01


def test_items_are_the_images_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits
    images = load_digits().images
    test = Digits("test")
    for position in (0, 100, 359):
        image, target = test[position]
        assert (image.mode, image.size) == ("L", (8, 8))
        np.testing.assert_allclose(np.asarray(image) / 255 * 16, images[test.indices[position]], atol=0.04)
        assert target == load_digits().target[test.indices[position]]


def test_transform_and_colour_mode() -> None:
    dataset = Digits("test", "RGB", transform=lambda image: image.mode)
    assert dataset[3][0] == "RGB"


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match=r"split must be one of train, test, validation .* got 'trian'"):
        Digits("trian")


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'visionbb\[demo\]'"):
        Digits("test")
