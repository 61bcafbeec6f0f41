"""Entry points from a table of variants, and a guard in front of timm's registry."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import nn

from ..backbones import Backbone, FeatureMaps


def imagenet_cfg(url: str = "", **kwargs) -> dict[str, Any]:
    """A pretrained cfg of timm for what most papers do: 1,000 classes, 224 pixels, a pyramid of stride 32.

    Args:
        url: of the weights; "" where there are none, or none with a direct link.
        kwargs: `first_conv`, `license`, `paper_ids`, `origin_url`, and what else is not as most do it.
    """
    return {
        "url": url, "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "classifier": "head.fc",
        **kwargs,
    }


def create_from(model_cls: type[Backbone]) -> Callable[..., nn.Module]:
    """The `create` that nearly every family has: timm's builder, with `features_only` giving NCHW maps.

    Those are of all stages of a pyramid (a model with `depths`), of the last three blocks of a column.
    """

    def create(variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
        out_indices = tuple(range(len(kwargs["depths"]))) if "depths" in kwargs else 3
        return build_model_with_cfg(
            model_cls, variant, pretrained,
            pretrained_filter_fn=model_cls.checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls=FeatureMaps),
            **kwargs,
        )

    return create


def register_variants(
    module_name: str,
    variants: Mapping[str, Mapping[str, Any]],
    create: Callable[..., nn.Module],
    tag_args: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Makes one timm entry point a variant, `name(pretrained=False, **kwargs)`, in the calling module.

    Args:
        module_name: `__name__` of the family's module, which holds `default_cfgs` already.
        variants: model name to the model's arguments, which a caller's keywords override.
        create: (variant, pretrained, **kwargs) -> model.
        tag_args: "name.tag" to arguments that go with a pretrained tag; they override those of the variant.

    Raises:
        ValueError: timm has a model of that name.
    """
    module = sys.modules[module_name]

    def entry_point(name: str, args: Mapping[str, Any]) -> Callable[..., nn.Module]:
        def build(pretrained: bool = False, **kwargs) -> nn.Module:
            of_tag = {}
            if tag_args:
                tag = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg")).tag
                of_tag = tag_args.get(f"{name}.{tag}", {})
            return create(name, pretrained, **{**args, **of_tag, **kwargs})

        build.__name__ = build.__qualname__ = name
        build.__module__ = module_name
        build.__doc__ = f"{name}: {', '.join(f'{key}={value}' for key, value in args.items())}"
        return build

    for name, args in variants.items():
        refuse_to_shadow(name)
        setattr(module, name, register_model(entry_point(name, args)))


def refuse_to_shadow(name: str) -> None:
    """timm's own registration would overwrite a model of the same name and delete its pretrained tags."""
    if timm.is_model(name) and not timm.model_entrypoint(name).__module__.startswith("visionbb."):
        raise ValueError(f"model name {name!r} belongs to timm {timm.__version__}; choose another")
