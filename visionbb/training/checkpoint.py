"""Checkpoints from which a run continues exactly.

An epoch is a function of the state it starts from: `seed_epoch` derives every random stream (data order, augmentation,
mixing, dropout) from the run's seed and the epoch, timm's schedules are functions of the epoch, and the rest (weights,
their moving average, optimizer, loss scale) is in the file. No state of a random generator has to be stored, and the
promise also holds for what data loading processes draw.
"""
from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import clean_state_dict
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import load_checkpoint_metadata, random_seed

from .config import ConfigError
from .tasks import RecordedTask

# Options that live on in the optimizer's state: another value would be overwritten by the checkpoint's.
_OPTIMIZER = {"opt", "opt_eps", "opt_betas", "opt_kwargs", "weight_decay", "momentum", "layer_decay"}
# Options that leave the weights of a resumed run as they would have been.
_HARMLESS = {"device", "output", "resume", "report", "stop_epoch", "checkpoint_hist", "validation_batch_size",
             "pretrained", "initial_checkpoint", "dataset_download", "data_dir"}


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed Python, NumPy and PyTorch (every device) for one epoch, independently of all other (seed, epoch) pairs."""
    random_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def find_checkpoint(resume: str | None, output: Path) -> Path | None:
    """Return the checkpoint that the option `resume` means: a path, or "auto" for the last one in `output`, if any.

    Raises:
        ConfigError: the given file does not exist.
    """
    if resume is None:
        return None
    path = output / "last.pth.tar" if resume == "auto" else Path(resume)
    if not path.is_file():
        if resume == "auto":
            return None
        raise ConfigError(f"resume: there is no checkpoint {path}")
    return path


def resume(path: Path, task: RecordedTask, optimizer: torch.optim.Optimizer, loss_scaler: Any) -> tuple[int, list[str]]:
    """Load weights, moving average, optimizer and loss scale from `path` into the objects of a run.

    Returns:
        The epoch to go on with, and a line for each option that was another one when the checkpoint was
        written and makes the continuation differ from the original run.

    Raises:
        ConfigError: not a training checkpoint, or one of another model or optimizer.
    """
    try:
        checkpoint = load_checkpoint_metadata(path)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"resume: {path} is not a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("args"), dict):
        raise ConfigError(f"resume: {path} was not written by a run; use initial_checkpoint to start from its weights")
    if checkpoint["arch"] != task.config.model:
        raise ConfigError(f"resume: {path} is of the model {checkpoint['arch']!r}, not {task.config.model!r}")
    _check_shapes(path, clean_state_dict(checkpoint["state_dict"]), task.get_eval_model().state_dict())
    before, now = checkpoint["args"], asdict(task.config)
    changes = {name: f"{name}: {before[name]} -> {value}" for name, value in now.items()
               if name not in _HARMLESS and name in before and before[name] != value}
    for name in sorted(_OPTIMIZER & changes.keys()):
        raise ConfigError(f"resume: a resumed run keeps its optimizer, but {changes[name]}")

    start_epoch = resume_task_checkpoint(task, path, optimizer, loss_scaler, log_info=False)
    if task.has_ema():
        load_task_ema_checkpoint(task, path)
    return start_epoch, list(changes.values())


def _check_shapes(path: Path, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [tuple(state[name].shape) if name in state else "nothing" for state in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"resume: {path} does not fit this model (see num_classes, in_chans, model_kwargs): "
                              f"{name} is {shapes[0]} there and {shapes[1]} here")
