"""The parts of a training run, built from its options."""
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import timm
import torch
from timm.data import resolve_input_data_config
from timm.data.loader import PrefetchLoader
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import CheckpointSaver, NativeScaler, random_seed
from torch import nn

from ..reduction import reduce_tokens
from .checkpoint import find_checkpoint, resume
from .config import ConfigError, TrainConfig, nearest
from .data import class_names, create_datasets, create_loaders
from .tasks import TASKS, RecordedTask


@dataclass
class Run:
    """Everything that `train` needs. `config` is resolved: it holds what defaults and `auto` became."""

    config: TrainConfig
    output: Path
    device: torch.device
    classes: list[str]  # names in index order
    task: RecordedTask
    train_loader: PrefetchLoader
    val_loader: PrefetchLoader
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    loss_scaler: NativeScaler | None
    saver: CheckpointSaver
    epochs: int  # of the whole schedule, cool-down and all
    start_epoch: int
    notes: list[str]  # what the user should know about a resumed run

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in one epoch."""
        return math.ceil(len(self.train_loader) / self.config.grad_accum_steps)

    @property
    def eval_model(self) -> nn.Module:
        """The weights to evaluate: the moving average where there is one."""
        return self.task.get_eval_model(ema=self.task.has_ema())

    def autocast(self) -> AbstractContextManager:
        """Return the mixed precision context of a forward pass."""
        if not self.config.amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.amp_dtype))


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" means the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: this machine or this build of PyTorch has no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion is how PyTorch says "not compiled with CUDA"
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def create_model(config: TrainConfig, num_classes: int | None, in_chans: int) -> nn.Module:
    """Create the model of a run through timm, its tokens reduced; None for `num_classes` keeps the model's own.

    Raises:
        ConfigError: constructor arguments that the model does not take, weights that it cannot take, or a token
            reduction that does not fit it.
    """
    args = resolve_model_input_args(
        config.model, {"img_size": config.img_size}, num_classes=num_classes, in_chans=in_chans, drop_rate=config.drop,
        drop_path_rate=config.drop_path, **config.model_kwargs)
    try:
        model = timm.create_model(pretrained=config.pretrained, checkpoint_path=config.initial_checkpoint, **args)
    except TypeError as error:
        raise ConfigError(f"model {config.model!r} with model_kwargs {config.model_kwargs}: {error}") from error
    except RuntimeError as error:  # there are none, or shapes differ
        if not config.pretrained and not config.initial_checkpoint:
            raise
        source = config.initial_checkpoint or "its pretrained weights"
        raise ConfigError(f"model {config.model!r} with model_kwargs {config.model_kwargs} cannot take {source}: "
                          f"{shorten(str(error), 500, placeholder=' ...')}") from error
    if config.reduction:
        size = {"input_size": (config.img_size, config.img_size)} if config.img_size else {}
        try:
            reduce_tokens(model, **size | config.reduction)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reduction {config.reduction} of model {config.model!r}: {error}") from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def create_teacher(config: TrainConfig, num_classes: int, in_chans: int) -> nn.Module:
    """Create the trained teacher of a run, for the classes and channels of its model.

    Raises:
        ConfigError: as for a model, and where there is no file of weights.
    """
    path = config.kd_pretrained_path
    if path and not Path(path).is_file():
        raise ConfigError(f"kd_pretrained_path: there is no file {path}")
    teacher = TrainConfig(model=config.kd_model_name, model_kwargs=config.kd_model_kwargs, img_size=config.img_size,
                          pretrained=path is None, initial_checkpoint=path)
    try:
        _in_chans(teacher)  # for its errors: an unknown name or tag
        return create_model(teacher, num_classes, in_chans)
    except ConfigError as error:
        raise ConfigError(f"teacher (kd_model_name, kd_model_kwargs, kd_pretrained_path): {error}") from error


def _in_chans(config: TrainConfig) -> int:
    """Return the channels of the model's images, which datasets need to know before there is a model."""
    name = config.model
    if ":" not in name and not timm.is_model(name):  # with a colon: a model on a hub or in a folder
        raise ConfigError(f"model {name!r} is unknown to timm and visionbb{nearest(name, timm.list_models())}")
    try:
        args = resolve_model_input_args(name, **config.model_kwargs)
    except RuntimeError as error:  # a known architecture with an unknown tag
        raise ConfigError(f"model {name!r}: {error}") from error
    return config.in_chans or args.get("in_chans") or args["pretrained_cfg"]["input_size"][0]


def prepare(config: TrainConfig) -> Run:
    """Build every part of the run that `config` describes, and load the checkpoint it resumes from.

    Creates the output folder and writes the resolved options to `args.yaml` in it.

    Raises:
        ConfigError: an unknown model, optimizer, dataset or device, missing data, or a checkpoint that does not fit.
        ModuleNotFoundError: the dataset needs a package that is not installed.
    """
    device = resolve_device(config.device)
    if config.amp and config.amp_dtype == "float16" and device.type != "cuda":
        raise ConfigError(f"amp_dtype float16 needs a CUDA device and this run is on {device}; use bfloat16")
    if config.initial_checkpoint and not Path(config.initial_checkpoint).is_file():
        raise ConfigError(f"initial_checkpoint: there is no file {config.initial_checkpoint}")
    if config.opt not in list_optimizers():
        raise ConfigError(f"opt {config.opt!r} is unknown to timm{nearest(config.opt, list_optimizers())}")
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    random_seed(config.seed)

    in_chans = _in_chans(config)
    datasets = create_datasets(config, in_chans)
    classes = class_names(datasets[0])
    num_classes = config.num_classes or (len(classes) if classes else None)
    if classes and num_classes < len(classes):
        raise ConfigError(f"num_classes is {num_classes}, but the dataset has {len(classes)} classes")
    model = create_model(config, num_classes, in_chans).to(device)
    classes = classes or [str(index) for index in range(model.num_classes)]

    teacher = None
    if config.kd_model_name:
        teacher = create_teacher(config, model.num_classes, in_chans).to(device)

    data_config = resolve_input_data_config(model if teacher is None else teacher, {
        "img_size": config.img_size, "mean": config.mean, "std": config.std,
        "interpolation": config.interpolation, "crop_pct": config.crop_pct})
    output = Path(config.output or f"outputs/{config.model}")
    height, width = data_config["input_size"][1:]
    config = replace(
        config, device=str(device), output=str(output), in_chans=in_chans, num_classes=model.num_classes,
        img_size=height if height == width else None, mean=data_config["mean"], std=data_config["std"],
        interpolation=data_config["interpolation"], crop_pct=data_config["crop_pct"],
        report=config.dataset == "visionbb/digits" if config.report is None else config.report)

    train_loader, val_loader = create_loaders(config, datasets, data_config, device)
    task = TASKS[config.task](model, config, device, teacher)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(config), **config.opt_kwargs)
    updates_per_epoch = math.ceil(len(train_loader) / config.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=updates_per_epoch)
    loss_scaler = NativeScaler(device.type) if config.amp and config.amp_dtype == "float16" else None

    output.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(
        model, optimizer, task=task, amp_scaler=loss_scaler, checkpoint_dir=str(output),
        max_history=config.checkpoint_hist)
    run = Run(config, output, device, classes, task, train_loader, val_loader, optimizer, scheduler, loss_scaler, saver,
              epochs, start_epoch=0, notes=[])
    if path := find_checkpoint(config.resume, output):
        _resume(run, path)
    config.save(output / "args.yaml")
    return run


def _resume(run: Run, path: Path) -> None:
    run.start_epoch, changes = resume(path, run.task, run.optimizer, run.loss_scaler)
    run.notes = [f"resumed from {path} after {run.start_epoch} epochs", *(f"changed since then: {c}" for c in changes)]
    if run.scheduler is not None:
        run.scheduler.step(run.start_epoch)
        run.scheduler.step_update(run.start_epoch * run.updates_per_epoch)
    if path.resolve().parent == run.output.resolve():
        run.saver.load_state_dict_from_checkpoint(path)
