"""The models that a measurement is about: named ones are built, and their tokens reduced; given ones are copied."""
from __future__ import annotations

import ast
import copy
import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from ..reduction import reduce_tokens
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

    A name may say how its tokens are reduced: "deit_small_patch16_224+tome:r=13" is the model after
    `reduce_tokens(model, "tome", r=13)`; further options follow behind commas, "+evit:keep=0.7,fuse_token=True".

    Args:
        input_size: side, (H, W) or (C, H, W); None takes the model's own. A named model of fixed input size is resized
            to it (timm's `set_input_size`).

    Raises:
        ValueError: timm knows no model of that name; a reduction that is none, or not for this model; `input_size` is
            no size, or None for a model without a cfg.
    """
    cfg = getattr(name_or_model, "pretrained_cfg", {})
    if isinstance(name_or_model, str):
        name = name_or_model
        architecture, reducing, reduction = name.partition("+")
        if ":" not in architecture and not timm.is_model(architecture):  # "hf-hub:..." and the like go to timm as is
            close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(f"unknown model {architecture!r}{hint}")
        model = timm.create_model(architecture)
        cfg = model.pretrained_cfg
    else:
        model = copy.deepcopy(name_or_model)
        name = cfg.get("architecture") or type(model).__name__
    if input_size is None and "input_size" not in cfg:
        raise ValueError(f"input_size must be given: {name} has no pretrained_cfg to take it from")
    shape = image_shape(cfg["input_size"] if input_size is None else input_size)
    if isinstance(name_or_model, str) and cfg.get("fixed_input_size") and shape != tuple(cfg["input_size"]):
        model.set_input_size(img_size=shape[1:])
    if isinstance(name_or_model, str) and reducing:
        try:
            reduce_tokens(model, **{"input_size": shape[1:]} | parse_reduction(reduction))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return Subject(name, model.to(device, dtype), shape)


def parse_reduction(text: str) -> dict[str, Any]:
    """The arguments of `reduce_tokens` in a text such as "evit:keep=0.7,fuse_token=True".

    Values are numbers, lists, mappings as Python writes them; what is none of these is a text.

    Raises:
        ValueError: the text is of another form.
    """
    method, _, options = text.partition(":")
    arguments: dict[str, Any] = {"method": method}
    for option in re.split(r",(?=\w+=)", options) if options else []:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise ValueError(f"a reduction must be METHOD:key=value,key=value..., got {text!r}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments[key] = value
    return arguments
