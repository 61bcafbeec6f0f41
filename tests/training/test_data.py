from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from visionbb.training import ConfigError, prepare
from visionbb.training.data import class_names, create_datasets


def test_folder_batches_have_the_promised_shapes(tiny_config) -> None:
    run = prepare(tiny_config())
    assert run.classes == ["blue", "green", "red"]
    assert run.config.num_classes == 3
    images, targets = next(iter(run.train_loader))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.shape == (4,)
    images, targets = next(iter(run.val_loader))
    assert images.shape == (4, 3, 32, 32)
    assert targets.tolist() == [0, 0, 0, 1]


def test_mixing_makes_soft_targets_until_its_last_epoch(tiny_config) -> None:
    run = prepare(tiny_config(mixup=1.0, cutmix=1.0, smoothing=0.0))
    _, targets = next(iter(run.train_loader))
    assert targets.shape == (4, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    run.train_loader.mixup_enabled = False
    _, targets = next(iter(run.train_loader))
    assert set(targets.unique().tolist()) == {0.0, 1.0}


def test_grey_digits_at_model_size_with_affine_changes(tiny_config) -> None:
    still = {"dataset": "visionbb/digits", "in_chans": 1, "scale": [1, 1], "ratio": [1, 1], "hflip": 0.0,
             "color_jitter": None, "val_split": "test"}
    run = prepare(tiny_config(**still))
    images, _ = next(iter(run.train_loader))
    assert images.shape == (4, 1, 32, 32)
    first, second = (run.train_loader.dataset[0][0] for _ in range(2))
    assert torch.equal(first, second)
    moving = prepare(tiny_config(**still, affine_degrees=15, affine_translate=0.1, affine_scale=0.1))
    first, second = (moving.train_loader.dataset[0][0] for _ in range(2))
    assert first.dtype == torch.uint8
    assert not torch.equal(first, second)
    calm = prepare(tiny_config(**still, affine_degrees=15, no_aug=True))
    assert torch.equal(*(calm.train_loader.dataset[0][0] for _ in range(2)))


@pytest.mark.parametrize(("options", "message"), [
    ({"dataset": "visionbb/digit"}, "dataset must be one of .*'visionbb/digit': did you mean 'visionbb/digits'"),
    ({"dataset": "imagenet"}, "dataset must be one of folder, visionbb/digits, visionbb/digit_cutouts or start with"),
    ({"dataset": "torch/nothing"}, "Unknown torchvision dataset nothing"),
    ({"data_dir": None}, "data_dir must be given for the dataset 'folder'"),
    ({"data_dir": "no/such/place"}, "data_dir no/such/place does not exist"),
    ({"val_split": "holdout"}, "no folder for the split 'holdout'; its folders: train, validation"),
    ({"dataset": "visionbb/digits", "val_split": "holdout"}, "split must be one of train, test"),
    ({"batch_size": 100}, r"batch_size 100 is larger than the training split \(24 images\)"),
    ({"in_chans": 4}, r"in_chans must be 1 \(grey\) or 3 \(RGB\)"),
])
def test_missing_or_wrong_data_is_named(tiny_config, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_config(**options))


def test_splits_must_have_the_same_classes(tiny_config, tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("validation", "ab")):
        for name in names:
            (tmp_path / "odd" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "odd" / split / name / "0.png")
    with pytest.raises(ConfigError, match="different classes; only one of them has: c"):
        create_datasets(tiny_config(data_dir=str(tmp_path / "odd"), batch_size=1), 3)


def test_empty_folder_is_an_error(tiny_config, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    with pytest.raises(ConfigError, match="Found 0 images"):
        create_datasets(tiny_config(data_dir=str(tmp_path / "empty")), 3)


def test_class_names_are_in_index_order(tiny_config) -> None:
    train_set, _ = create_datasets(tiny_config(), 3)
    assert class_names(train_set) == sorted(train_set.reader.class_to_idx)
    assert class_names(torch.utils.data.TensorDataset(torch.zeros(1))) is None
