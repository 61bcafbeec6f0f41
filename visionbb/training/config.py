"""Every option of a training run, described once.

`TrainConfig` holds the names (timm's), types, defaults, allowed values and help texts. The command line is built from
it, YAML recipes are checked against it, and the resolved options are written from it.
"""
# ruff: noqa: RUF009 (_option returns a dataclass field)
from __future__ import annotations

import argparse
import contextlib
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class ConfigError(ValueError):
    """An option that cannot be: its message names the option, what came and what is allowed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" for the closest of `allowed`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def _option(default: Any, help: str, *, choices: Sequence[Any] | None = None, low: float | None = None,
            high: float | None = None, short: str | None = None) -> Any:
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "short": short}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run. Values are checked on construction.

    Raises:
        ConfigError: for a value of the wrong type, outside its range or not among its choices, and for options that
            contradict each other. The message names the option.
    """

    # Task
    task: str = _option("classification", "what is learnt: classes; a teacher's attention maps (Hedgehog), which turns "
                        "the teacher into the model: a ViT with linear attention; classes from few tokens and from "
                        "more, which must agree (MCTF); classes and how many tokens they need (AS-ViT); or classes "
                        "and which tokens they need, with a teacher that sees all (DynamicViT)",
                        choices=("classification", "attention_distillation", "reduction_consistency",
                                 "reduction_budget", "reduction_distillation"))
    kd_model_name: str | None = _option(None, "model name of the teacher, which sees the same images")
    kd_model_kwargs: dict = _option({}, "further constructor arguments of the teacher, key=value ...")
    kd_pretrained_path: str | None = _option(None, "weights of the teacher in a file; default: its pretrained weights")
    consistency_weight: float = _option(3.0, "weight of the agreement in task reduction_consistency", low=0)
    consistency_max_r: int | None = _option(None, "the pass with more tokens removes less than this a block, in task "
                                            "reduction_consistency; default: less than the other pass", low=1)
    budget_gmacs: float | None = _option(None, "1e9 multiply-adds an image that task reduction_budget aims at", low=0)
    budget_weight: float = _option(2.0, "weight of missing budget_gmacs, in the same unit", low=0)
    ratio_weight: float = _option(2.0, "weight of missing the schedule's shares of tokens, in task "
                                  "reduction_distillation", low=0)
    distill_weight: float = _option(0.5, "weight of the distances from the teacher's logits and tokens, in task "
                                    "reduction_distillation", low=0)

    # Model
    model: str = _option("nat_tiny", "model name, any of timm.list_models() or a hub name (hf-hub:...)")
    pretrained: bool = _option(False, "start from pretrained weights")
    initial_checkpoint: str | None = _option(None, "start from the weights in this file")
    num_classes: int | None = _option(None, "size of the classifier; default: the classes of the dataset", low=1)
    img_size: int | None = _option(None, "input height and width in pixels; default: the model's", low=1)
    in_chans: int | None = _option(None, "input channels; default: the model's", low=1)
    drop: float | None = _option(None, "classifier dropout rate", low=0, high=1)
    drop_path: float | None = _option(None, "stochastic depth rate", low=0, high=1)
    reduction: dict = _option({}, "token reduction of a ViT: method=tome r=8, or keep, target_gmacs and the method's "
                              "options, as visionbb.reduction.reduce_tokens takes them")
    grad_checkpointing: bool = _option(False, "recompute activations in the backward pass to save memory")
    model_kwargs: dict = _option({}, "further constructor arguments, key=value ...")

    # Data
    data_dir: str | None = _option(None, "root of the dataset; a folder dataset has one sub-folder a split")
    dataset: str = _option("folder", "folder, visionbb/digits, visionbb/digit_cutouts, or a timm name: torch/..., "
                          "hfds/..., tfds/..., wds/...")
    dataset_download: bool = _option(False, "let torch/, hfds/ and tfds/ datasets download themselves")
    train_split: str = _option("train", "name of the training split")
    val_split: str = _option("validation", "name of the evaluation split")
    batch_size: int = _option(128, "images a training step", low=1, short="-b")
    validation_batch_size: int | None = _option(None, "images an evaluation step; default: batch_size", low=1)
    workers: int = _option(4, "data loading processes; 0 loads in the main process", low=0, short="-j")
    mean: list[float] | None = _option(None, "channel means of pixels in 0..1; default: the teacher's or model's")
    std: list[float] | None = _option(None, "channel deviations of pixels in 0..1; default: the teacher's or model's")
    interpolation: str | None = _option(None, "evaluation resize; default: the model's", choices=INTERPOLATIONS)
    crop_pct: float | None = _option(None, "evaluation centre crop, as a part of the side; default: the model's", low=0)

    # Augmentation
    no_aug: bool = _option(False, "resize only: no augmentation of any kind")
    train_crop_mode: str = _option("rrc", "random resized crop, or ratio-keeping resize with centre or random crop",
                                   choices=("rrc", "rkrc", "rkrr"))
    scale: list[float] = _option([0.08, 1.0], "range of the random crop's area")
    ratio: list[float] = _option([3 / 4, 4 / 3], "range of the random crop's aspect ratio")
    train_interpolation: str = _option("random", "resize of training images", choices=("random", *INTERPOLATIONS))
    hflip: float = _option(0.5, "probability of a horizontal flip", low=0, high=1)
    vflip: float = _option(0.0, "probability of a vertical flip", low=0, high=1)
    color_jitter: float | None = _option(0.4, "strength of brightness, contrast and saturation changes", low=0)
    aa: str | None = _option(None, "automatic augmentation policy, such as rand-m9-mstd0.5-inc1, original or 3a")
    affine_degrees: float = _option(0.0, "random affine: largest rotation, in degrees", low=0, high=180)
    affine_translate: float = _option(0.0, "random affine: largest shift, as a part of the side", low=0, high=1)
    affine_scale: float = _option(0.0, "random affine: scale factors are drawn from 1 - s to 1 + s", low=0, high=0.99)
    reprob: float = _option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = _option("pixel", "what erased pixels become", choices=("const", "rand", "pixel"))
    recount: int = _option(1, "largest number of erased boxes", low=1)
    mixup: float = _option(0.0, "mixup alpha; 0 is off", low=0)
    cutmix: float = _option(0.0, "cutmix alpha; 0 is off", low=0)
    mixup_prob: float = _option(1.0, "probability of mixup or cutmix", low=0, high=1)
    mixup_switch_prob: float = _option(0.5, "probability of cutmix where both are on", low=0, high=1)
    mixup_mode: str = _option("batch", "draw mixing parameters per batch, pair or element",
                              choices=("batch", "pair", "elem"))
    mixup_off_epoch: int | None = _option(None, "stop mixing from this epoch on", low=0)

    # Loss and optimizer
    loss: str = _option("ce", "softmax or binary cross-entropy", choices=("ce", "bce"))
    smoothing: float = _option(0.1, "label smoothing", low=0, high=1)
    opt: str = _option("adamw", "optimizer, any of timm.optim.list_optimizers()")
    lr: float = _option(1e-3, "peak learning rate", low=0)
    weight_decay: float = _option(0.05, "weight decay (not on biases and norms)", low=0)
    momentum: float = _option(0.9, "momentum of optimizers that have one", low=0, high=1)
    opt_eps: float | None = _option(None, "epsilon of the optimizer; default: the optimizer's", low=0)
    opt_betas: list[float] | None = _option(None, "betas of the optimizer; default: the optimizer's")
    opt_kwargs: dict = _option({}, "further optimizer arguments, key=value ...")
    layer_decay: float | None = _option(None, "learning rate factor from each layer to the one before", low=0, high=1)
    clip_grad: float | None = _option(None, "clip gradients at this value; default: no clipping", low=0)
    clip_mode: str = _option("norm", "what is clipped: global norm, each value, or adaptive (agc)",
                             choices=("norm", "value", "agc"))
    grad_accum_steps: int = _option(1, "batches whose gradients make one update", low=1)

    # Schedule
    epochs: int = _option(300, "epochs of the schedule", low=1)
    stop_epoch: int | None = _option(None, "stop after this many epochs without changing the schedule", low=1)
    sched: str = _option("cosine", "learning rate schedule",
                         choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"))
    sched_on_updates: bool = _option(True, "move the learning rate at every update; otherwise once an epoch")
    warmup_epochs: int = _option(5, "epochs of linear warm-up", low=0)
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = _option(False, "add the warm-up before the epochs instead of counting it among them")
    cooldown_epochs: int = _option(0, "epochs at min_lr after the schedule", low=0)
    min_lr: float = _option(0.0, "learning rate at the end", low=0)
    decay_epochs: float | None = _option(None, "interval of step decay, or length of the wsd and rsqrt decay", low=0)
    decay_milestones: list[int] = _option([90, 180, 270], "epochs of multistep decay")
    decay_rate: float = _option(0.1, "factor of step and multistep decay, power of poly", low=0)

    # Averaging and precision
    model_ema: bool = _option(False, "keep an exponential moving average of the weights, and evaluate that")
    model_ema_decay: float = _option(0.9998, "decay of the moving average", low=0, high=1)
    model_ema_warmup: bool = _option(False, "let the decay grow from 0 over the first updates")
    amp: bool = _option(False, "automatic mixed precision")
    amp_dtype: str = _option("bfloat16", "mixed precision type; float16 needs CUDA and brings loss scaling",
                             choices=("bfloat16", "float16"))

    # Run
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps ...; auto takes the first accelerator there is")
    seed: int = _option(42, "seed of weights, data order and augmentation", low=0)
    deterministic: bool = _option(False, "ask PyTorch for deterministic algorithms (slower on GPUs)")
    output: str | None = _option(None, "output folder; default: outputs/<model>")
    resume: str | None = _option(None, "checkpoint to continue from, or auto: the output folder's last one, if any")
    checkpoint_hist: int = _option(1, "best epochs to keep beside last and model_best", low=1)
    report: bool | None = _option(None, "draw predictions and confusion matrix; default: for visionbb/digits")

    def __post_init__(self) -> None:
        for option, kind in _options():
            object.__setattr__(self, option.name, _checked(option, kind, getattr(self, option.name)))
        if self.mixes and self.batch_size % 2:
            raise ConfigError(f"batch_size must be even with mixup or cutmix, got {self.batch_size}")
        for name in ("scale", "ratio"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
                raise ConfigError(f"{name} must be two numbers, 0 < low <= high, got {low_high}")
        if self.reduction and "method" not in self.reduction:
            raise ConfigError(f"reduction must name a method, got {self.reduction}")
        if self.task.startswith("reduction_") and not self.reduction:
            raise ConfigError(f"reduction must be set with task {self.task!r}")
        if (self.budget_gmacs is None) == (self.task == "reduction_budget"):
            raise ConfigError(f"budget_gmacs must be set with task 'reduction_budget' and no other, "
                              f"got {self.budget_gmacs} with task {self.task!r}")
        taught = self.task.endswith("_distillation")
        if taught and self.kd_model_name is None:
            raise ConfigError(f"kd_model_name must name the teacher of task {self.task!r}")
        unwanted, reason = (), ""
        if self.inherits:
            unwanted, reason = ("pretrained", "initial_checkpoint"), "gives the model the teacher's weights"
        elif not taught:
            unwanted, reason = ("kd_model_name", "kd_model_kwargs", "kd_pretrained_path"), "has no teacher"
        for name in unwanted:
            if getattr(self, name):
                raise ConfigError(f"{name} must be unset with task {self.task!r}, which {reason}; "
                                  f"got {getattr(self, name)!r}")

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed, which makes their targets soft."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def inherits(self) -> bool:
        """Whether the model starts from its teacher's weights."""
        return self.task == "attention_distillation"

    @property
    def starts_trained(self) -> bool:
        """Whether the weights at the start come from another training, so that their accuracy is of interest."""
        return bool(self.pretrained or self.initial_checkpoint or self.inherits)

    def save(self, path: Path) -> None:
        """Write every option as YAML; the file is itself a recipe for `--config`."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False), encoding="utf-8")


@cache
def _options() -> list[tuple[Field, Any]]:
    """List the fields of `TrainConfig` with their resolved types."""
    hints = typing.get_type_hints(TrainConfig)
    return [(option, hints[option.name]) for option in fields(TrainConfig)]


def _split_optional(kind: Any) -> tuple[Any, bool]:
    """Turn `T | None` into (T, True) and `T` into (T, False)."""
    if isinstance(kind, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        return inner, True
    return kind, False


def _checked(option: Field, kind: Any, value: Any) -> Any:
    """Return `value` as the option's type, or raise a ConfigError that names the option."""
    inner, optional = _split_optional(kind)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{option.name} must be a list, got {value!r}")
        return [_scalar(option, typing.get_args(inner)[0], item) for item in value]
    return _scalar(option, inner, value)


def _scalar(option: Field, kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3, without a dot, as text
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{option.name} must be of type {kind.__name__}, got {value!r} ({type(value).__name__})")
    choices, low, high = (option.metadata[key] for key in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        raise ConfigError(f"{option.name} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{option.name} must be {bounds}, got {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Build the command line: one flag an option, `--no-flag` for switches, `none` for an unset value."""
    parser = argparse.ArgumentParser(
        description="Train an image classifier. Options: defaults, then the YAML recipe, then the command line.",
        usage="%(prog)s [--config RECIPE.yaml] [--option value ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML recipe: option names as keys")
    defaults = TrainConfig()
    for option, kind in _options():
        inner, optional = _split_optional(kind)
        flags = [name for name in (option.metadata["short"], "--" + option.name.replace("_", "-")) if name]
        default, choices = getattr(defaults, option.name), option.metadata["choices"]
        settings: dict[str, Any] = {
            "dest": option.name, "help": option.metadata["help"] + ("" if default in (None, {}) else f" [{default}]")}
        if inner is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif inner is dict:
            settings |= {"nargs": "*", "action": ParseKwargs, "type": _key_value, "metavar": "KEY=VALUE"}
        else:
            item, many = (typing.get_args(inner)[0], True) if typing.get_origin(inner) is list else (inner, False)
            settings |= {"type": _or_none(item) if optional and not many else item,
                         "metavar": "{" + ",".join(choices) + "}" if choices else item.__name__.upper()}
            if many:
                settings["nargs"] = "+"
        parser.add_argument(*flags, **settings)
    return parser


def _or_none(kind: type) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)
    parse.__name__ = kind.__name__  # argparse names it in its error message
    return parse


def _key_value(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return text


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe into a dict of options.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, or has a key that is no option; the message names the
            key and the nearest option.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path} ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"config: {path} must hold a mapping of options, got {type(recipe).__name__}")
    names = [option.name for option in fields(TrainConfig)]
    for key in recipe:
        if key not in names:
            raise ConfigError(f"config: {path} has the unknown option {key!r}{nearest(str(key), names)}")
    return recipe


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """Resolve the options of a run: defaults, overridden by the `--config` recipe, overridden by the command line.

    Raises:
        ConfigError: an unknown option or a value that is not allowed.
        SystemExit: from argparse, for `--help` and for text that does not parse as the option's type.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}")
    overrides = vars(given)
    recipe = load_recipe(overrides.pop("config")) if "config" in overrides else {}
    return TrainConfig(**(recipe | overrides))
