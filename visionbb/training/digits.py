"""The handwritten digits that come with scikit-learn: a real dataset that needs no download."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SPLITS = ("train", "test", "validation")


class DigitImages(Dataset):
    """`images` and their digits, `targets`; items are `(image, target)`, through `transform` if there is one."""

    classes = [str(digit) for digit in range(10)]
    images: list[Image.Image]
    targets: list[int]
    transform: Callable[[Image.Image], Any] | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


class Digits(DigitImages):
    """1,797 grey 8 x 8 images of handwritten digits, ten classes, split once and for all.

    A stratified fifth (360 images) is held out for testing; the split does not depend on any run's seed.
    Items are `(image, target)`: a PIL image, passed through `transform` if there is one, and the digit as an int.

    Args:
        split: "train" (1,437 images), or "test" (360), which "validation" names too.
        input_img_mode: PIL mode of the images, "L" (one channel) or "RGB" (three equal ones).
        transform: called with each image; timm's `create_loader` sets it.

    Raises:
        ValueError: for an unknown split.
        ModuleNotFoundError: without scikit-learn, naming the extra that brings it.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
    (its test part, as `sklearn.datasets.load_digits` ships it).
    """

    def __init__(self, split: str, input_img_mode: str = "L", transform: Callable[[Image.Image], Any] | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)} for visionbb/digits, got {split!r}")
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the dataset visionbb/digits needs scikit-learn: pip install 'visionbb[demo]'") from error
        images, targets = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
        self.indices = train if split == "train" else test
        pixels = np.rint(images[self.indices].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # inks run from 0 to 16
        self.images = [Image.fromarray(image).convert(input_img_mode) for image in pixels]
        self.targets = [int(target) for target in targets[self.indices]]
        self.transform = transform
