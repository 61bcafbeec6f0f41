"""A small folder of pictures and tiny runs on it."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionbb.training import TrainConfig

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 40, 50)}


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/<colour>/*.png with 8 noisy pictures a class, validation/<colour>/*.png with 3, of uneven sizes."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 3)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.array(colour) + noise.integers(-40, 41, (36 + index, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def tiny_config(picture_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes the options of a tiny run on the pictures, with overrides."""
    def make(**overrides: Any) -> TrainConfig:
        options = {
            "model": "test_efficientnet", "img_size": 32, "data_dir": str(picture_folder), "batch_size": 4,
            "workers": 0, "epochs": 4, "warmup_epochs": 1, "device": "cpu", "output": str(tmp_path / "run")}
        return TrainConfig(**(options | overrides))
    return make
