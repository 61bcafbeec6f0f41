"""From options to batches: timm's datasets, transforms and loaders, and the digits of this package."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, ImageDataset, create_dataset, create_loader
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandomAffine

from .config import ConfigError, TrainConfig, nearest
from .digit_scenes import DigitCutouts
from .digits import Digits

DATASETS = {"visionbb/digits": Digits, "visionbb/digit_cutouts": DigitCutouts}
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


def create_datasets(config: TrainConfig, in_chans: int) -> tuple[Dataset, Dataset]:
    """Open the training and the evaluation split, with images of `in_chans` channels.

    Raises:
        ConfigError: unknown dataset, missing data_dir or split folder, or splits whose classes differ.
    """
    if in_chans not in (1, 3):
        raise ConfigError(f"in_chans must be 1 (grey) or 3 (RGB) for image datasets, got {in_chans}")
    img_mode = "L" if in_chans == 1 else "RGB"
    train_set, val_set = (_open_split(config, split, img_mode) for split in (config.train_split, config.val_split))
    classes = [class_names(dataset) for dataset in (train_set, val_set)]
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0] or []) ^ set(classes[1] or []))
        raise ConfigError(f"the splits {config.train_split!r} and {config.val_split!r} of {config.data_dir} have "
                          f"different classes; only one of them has: {', '.join(odd[:5])}")
    if len(train_set) < config.batch_size:
        raise ConfigError(f"batch_size {config.batch_size} is larger than the training split ({len(train_set)} images)")
    return train_set, val_set


def _open_split(config: TrainConfig, split: str, img_mode: str) -> Dataset:
    name, root = config.dataset, config.data_dir
    if name in DATASETS:
        try:
            return DATASETS[name](split, img_mode)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if name != "folder" and not name.lower().startswith(TIMM_PREFIXES):
        allowed = ("folder", *DATASETS)
        raise ConfigError(f"dataset must be one of {', '.join(allowed)} or start with {', '.join(TIMM_PREFIXES)}; "
                          f"got {name!r}{nearest(name, allowed)}")
    if name == "folder" or name.startswith("torch/"):
        if root is None:
            raise ConfigError(f"data_dir must be given for the dataset {name!r}")
        if not Path(root).exists() and not config.dataset_download:
            raise ConfigError(f"data_dir {root} does not exist")
    try:
        dataset = create_dataset(
            "" if name == "folder" else name, root=root, split=split, is_training=split == config.train_split,
            batch_size=config.batch_size, seed=config.seed, download=config.dataset_download, input_img_mode=img_mode)
    except (AssertionError, RuntimeError) as error:  # how timm says: unknown torch/ name, no image in the folder
        raise ConfigError(f"dataset {name!r}, data_dir {root}: {error}") from error
    if name == "folder" and Path(root).is_dir() and Path(dataset.reader.root) == Path(root):
        # timm would read the whole of data_dir, other splits and all
        found = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
        raise ConfigError(f"data_dir {root} has no folder for the split {split!r}; its folders: {', '.join(found)}")
    return dataset


def class_names(dataset: Dataset) -> list[str] | None:
    """Return the names of the classes in index order, or None where the dataset does not know them."""
    if isinstance(dataset, ImageDataset):
        class_to_idx = getattr(dataset.reader, "class_to_idx", None)
        return sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else None
    return getattr(dataset, "classes", None)


def create_loaders(
        config: TrainConfig,
        datasets: tuple[Dataset, Dataset],
        data_config: dict[str, Any],
        device: torch.device,
) -> tuple[Any, Any]:
    """Build timm's loaders: batches of normalised images (B, C, H, W) and their targets, on `device`.

    Training targets are class indices (B,), or soft (B, num_classes) where mixup or cutmix is on.

    Args:
        config: resolved, so that `num_classes` is a number.
        data_config: as from `timm.data.resolve_input_data_config`: input_size, mean, std, interpolation, crop_pct ...
    """
    shared = {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": config.workers,
        "pin_memory": device.type == "cuda",
        "device": device,
        # Workers start anew, and newly seeded, every epoch: what lets a resumed run see the same images.
        "persistent_workers": False,
    }
    mix = None
    if config.mixes:
        mix = FastCollateMixup(
            mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob, mode=config.mixup_mode, label_smoothing=config.smoothing,
            num_classes=config.num_classes)
    train_set, val_set = datasets
    train_loader = create_loader(
        train_set, batch_size=config.batch_size, is_training=True, no_aug=config.no_aug, collate_fn=mix,
        re_prob=config.reprob, re_mode=config.remode, re_count=config.recount, train_crop_mode=config.train_crop_mode,
        scale=config.scale, ratio=config.ratio, hflip=config.hflip, vflip=config.vflip,
        color_jitter=config.color_jitter, auto_augment=config.aa, interpolation=config.train_interpolation, **shared)
    if not config.no_aug and (config.affine_degrees or config.affine_translate or config.affine_scale):
        affine = RandomAffine(
            config.affine_degrees, translate=(config.affine_translate,) * 2,
            scale=(1 - config.affine_scale, 1 + config.affine_scale), interpolation=InterpolationMode.BILINEAR)
        train_set.transform.transforms.insert(-1, affine)  # at full size, before the conversion to a tensor
    val_loader = create_loader(
        val_set, batch_size=config.validation_batch_size or config.batch_size,
        interpolation=data_config["interpolation"], crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"], **shared)
    return train_loader, val_loader
