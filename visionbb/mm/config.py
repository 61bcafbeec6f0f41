"""mm config files: loading them, building from them, and what a machine asks them to give up."""
from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from torch import nn


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """The config in `path`, its bases merged, dotted keys of `options` on top.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config {str(path)!r}")
    config = Config.fromfile(path)
    if "model" not in config:
        raise ValueError(f"{str(path)!r} describes no model")
    if options:
        config.merge_from_dict(dict(options))
    return config


def fit_to_machine(config: Config) -> list[str]:
    """Takes back, in place, what this machine has no means for; returns what was changed, in words.

    Mixed precision needs an accelerator (mmengine refuses to build it without one).
    """
    if torch.cuda.is_available() or config.get("optim_wrapper", {}).get("type") != "AmpOptimWrapper":
        return []
    config.optim_wrapper.type = "OptimWrapper"
    for key in ("loss_scale", "dtype"):
        config.optim_wrapper.pop(key, None)
    return ["no GPU here: training in single precision instead of mixed"]


def build_model(config: Config) -> nn.Module:
    """The detector or segmentor that a config describes, with random weights."""
    init_default_scope(config.get("default_scope", "mmengine"))
    return MODELS.build(config.model)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs of a command line, as mmengine reads them: numbers, lists, tuples, booleans or text.

    Raises:
        ValueError: a pair without "=".
    """
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"options are KEY=VALUE, got {wrong[0]!r}")
    parser = ArgumentParser()
    parser.add_argument("options", nargs="*", action=DictAction)
    return parser.parse_args(pairs).options or {}
