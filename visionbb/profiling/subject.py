"""The models that a measurement is about: named ones are built, given ones are copied."""
from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import NamedTuple

import timm
import torch
from torch import nn

from .flops import image_shape


class Subject(NamedTuple):
    """A model ready to be measured, and the (C, H, W) of its images."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]

    def images(self, batch_size: int) -> torch.Tensor:
        """Random images on the model's device, in its dtype."""
        like = next(self.model.parameters())
        return torch.randn(batch_size, *self.shape, device=like.device, dtype=like.dtype)


def subject(
    name_or_model: str | nn.Module,
    input_size: int | Iterable[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """Builds a model by its timm name, random weights, or copies a given one; moves it to `device` and `dtype`.

    Args:
        input_size: side, (H, W) or (C, H, W); None takes the model's own. A named model of fixed input size is resized
            to it (timm's `set_input_size`).

    Raises:
        ValueError: timm knows no model of that name; `input_size` is no size, or None for a model without a cfg.
    """
    cfg = getattr(name_or_model, "pretrained_cfg", {})
    if isinstance(name_or_model, str):
        if ":" not in name_or_model and not timm.is_model(name_or_model):  # "hf-hub:..." and the like go to timm as is
            close = difflib.get_close_matches(name_or_model, timm.list_models(), n=3)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(f"unknown model {name_or_model!r}{hint}")
        model = timm.create_model(name_or_model)
        name, cfg = name_or_model, model.pretrained_cfg
    else:
        model = copy.deepcopy(name_or_model)
        name = cfg.get("architecture") or type(model).__name__
    if input_size is None and "input_size" not in cfg:
        raise ValueError(f"input_size must be given: {name} has no pretrained_cfg to take it from")
    shape = image_shape(cfg["input_size"] if input_size is None else input_size)
    if isinstance(name_or_model, str) and cfg.get("fixed_input_size") and shape != tuple(cfg["input_size"]):
        model.set_input_size(img_size=shape[1:])
    return Subject(name, model.to(device, dtype), shape)
