"""Reducing a model, and having it back."""
from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from torch import nn

from .blocks import adapter_for
from .method import METHODS
from .models import Reduced, Reducer, family_for, reduced_class
from .schedule import Cost, budget, constant_r, keep_ratio, reduces


def reduce_tokens(
    model: nn.Module,
    method: str,
    *,
    r: int | tuple[int, float] | Sequence[int] | Mapping[int, int] | None = None,
    keep: float | Sequence[float] | Mapping[int, float] | None = None,
    target_gmacs: float | None = None,
    input_size: tuple[int, int] | None = None,
    **options,
) -> nn.Module:
    """Lets a ViT compute with fewer and fewer tokens, in place; `remove_reduction` undoes it.

        model = timm.create_model("deit_small_patch16_224", pretrained=True)
        visionbb.reduction.reduce_tokens(model, "tome", r=13)
        print(model.reduction.report(images))

    The model keeps its parameters and their names, and all that timm's contract has: `forward_features` and
    `forward_intermediates` give every patch as the token it ended in, training goes through the merged tokens. Prefix
    tokens (class, distillation, registers) never move. A model that is reduced already is reduced anew.

    Known are timm's `VisionTransformer` and `Eva` with pre-norm blocks, and this package's columns of
    `TokenBlock`s with `SoftmaxAttention`. Forward hooks on blocks do not run.

    Args:
        method: a name in `METHODS`.
        r: patch tokens that each block removes: one number, (mean, slope) for a linear run from mean * (1 - slope) to
            mean * (1 + slope), a list with an entry a block, or {block: number}. No block removes more than the method
            allows, for ToMe half of its tokens.
        keep: share of its patch tokens that a block keeps, in (0, 1], rounded up: one number for the blocks that the
            method is used at, a list, or {block: share}.
        target_gmacs: 1e9 multiply-adds an image, from which r or keep is found.
        input_size: (height, width) in pixels that target_gmacs is meant for; None for the model's own.
        options: those of the method.

    Returns:
        The model.

    Raises:
        TypeError: a model, block or attention that reduction does not know, and why; an unknown option.
        ValueError: an unknown method, a schedule that does not fit, a class token that is missed.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(sorted(METHODS))}, got {method!r}")
    cls = METHODS[method]
    if unknown := options.keys() - inspect.signature(cls).parameters.keys():
        allowed = ", ".join(inspect.signature(cls).parameters) or "none"
        raise TypeError(f"{method} has no option {sorted(unknown)[0]!r}; it has: {allowed}")
    reducing = cls(**options)
    family = model.reducer.family if isinstance(model, Reduced) else family_for(model)
    adapter = adapter_for(model.blocks)
    if cls.needs_class_token and not family.has_class(model):
        raise ValueError(f"{method} reads the attention of the class token, which {type(model).__name__} has not")

    depth = len(model.blocks)
    reducing.build(depth, model.num_features, adapter.attention(model.blocks[0]).num_heads)
    given = {"r": r, "keep": keep, "target_gmacs": target_gmacs}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != (0 if cls.adaptive else 1):
        wanted = "none of" if cls.adaptive else "exactly one of"
        raise ValueError(f"{method} takes {wanted} r, keep and target_gmacs, got {', '.join(named) or 'none'}")
    if cls.adaptive:
        schedule = (0,) * depth
    elif r is not None:
        schedule = constant_r(r, reducing, depth)
    elif keep is not None:
        schedule = keep_ratio(keep, reducing, depth)
    else:
        rows, cols = family.grid(model, input_size or _own_size(model))
        cost = Cost.of(model, adapter, family.embedding(model), rows * cols, family.prefix(model))
        schedule = budget(target_gmacs, cost, reducing, depth)

    if not cls.elsewhere:
        blocks = reducing.blocks(depth)
        if other := [b for b, entry in enumerate(schedule) if reduces(entry) and b not in blocks]:
            allowed = ", ".join(map(str, blocks))
            raise ValueError(f"{method} has what it needs at blocks {allowed}; the schedule names {other[0]}")
    like = next(model.parameters())
    reducing.to(like.device, like.dtype)
    remove_reduction(model)
    model.reducer = Reducer(reducing, schedule, family, adapter)
    model.__class__ = reduced_class(type(model))
    model.reducer.train(model.training)
    return model


def remove_reduction(model: nn.Module) -> nn.Module:
    """Gives a model back as it was before `reduce_tokens`, in place; a plain one stays as it is."""
    if isinstance(model, Reduced):
        model.__class__ = model.plain_class
        del model.reducer
    return model


def _own_size(model: nn.Module) -> tuple[int, int]:
    return tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:])
