"""What every model of the zoo answers to: timm's contract, written once.

A backbone is stem -> units -> norm -> head, where the units are the stages of a `Pyramid` or the blocks of a
`Columnar`. Tokens are (B, H, W, C) from the stem to the head.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from torch import nn

from .._timm_compat import FeatureGetterNet, feature_take_indices
from .patches import PositionEmbed


class Backbone(nn.Module):
    """Base of the skeletons; subclasses set `stem`, the units, `norm` and `feature_info`, then call `add_head`.

    Attributes:
        output_fmt: the layout of `forward_features`, "NHWC" but for columns with a class token, "NLC".
        feature_info: one dict a unit: num_chs, reduction (input pixels a token, per axis), module (dotted name).
    """

    units = ""  # name of the nn.Sequential that forward_intermediates taps and pruning truncates
    output_fmt = "NHWC"

    def __init__(self, in_chans: int, num_classes: int):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes

    def add_head(self, num_features: int, global_pool: str, drop_rate: float, head: nn.Module | None, **dd) -> None:
        """Closes the model with `head` (default: pool, dropout, linear) and initialises the weights."""
        self.num_features = num_features
        self.head = head or ClassifierHead(
            num_features, self.num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    # ---- Weights ----------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises all weights; with `needs_reset` also those a constructor has set (after `to_empty`)."""
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
        """The authors' key names to ours; a family sets its own where there are authors' checkpoints.

        Checkpoints of ours come back as they are, but for `PositionEmbed`s of another size, which are resampled.
        """
        state_dict, _ = keep_native(state_dict)
        for path, module in model.named_modules():
            if isinstance(module, PositionEmbed) and (key := f"{path}.weight") in state_dict:
                state_dict[key] = module.resampled(state_dict[key])
        return state_dict

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """As in PyTorch; also takes an official checkpoint, so that `create_model(checkpoint_path=...)` does."""
        return super().load_state_dict(self.checkpoint_filter_fn(state_dict, self), strict, assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to keep from weight decay, as the mixers declare them."""
        return {
            f"{path}.{name}" if path else name
            for path, module in self.named_modules()
            if module is not self and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }

    # ---- Head -------------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; 0 classes removes it, `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    # ---- Intermediate features --------------------------------------------------------------------------------------

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features after chosen units (stages of a pyramid, blocks of a column).

        Args:
            x: images (B, in_chans, H, W).
            indices: which units: the last n if int, all if None.
            norm: apply the final norm where it fits: to every unit of a column, to the last stage of a pyramid.
            stop_early: run no unit after the last one taken.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: return the list alone.

        Returns:
            The intermediates, or (final features as `forward_features` gives them, intermediates). The final norm is
            skipped if the run stopped early.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        units = getattr(self, self.units)
        take, last = feature_take_indices(len(units), indices)
        x, taken = self.forward_units(x, units[: last + 1] if stop_early else units, take, norm)
        if output_fmt == "NCHW":
            taken = [t.permute(0, 3, 1, 2).contiguous() for t in taken]
        if intermediates_only:
            return taken
        return (x if stop_early and last < len(units) - 1 else self.final_norm(x)), taken

    def forward_units(
        self, x: torch.Tensor, units: nn.Module, take: Sequence[int], norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Images through the stem and `units`: what the last one gives, and the maps (B, H, W, C) after those taken."""
        x = self.forward_stem(x)
        taken = []
        for i, unit in enumerate(units):
            x = self.forward_unit(unit, x)
            if i in take:
                tokens = self.as_map(x)
                taken.append(self.norm(tokens) if norm and self._norm_fits(i) else tokens)
        return x, taken

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the chosen intermediates do not need, in place; returns their indices."""
        units = getattr(self, self.units)
        take, last = feature_take_indices(len(units), indices)
        cut = last < len(units) - 1
        setattr(self, self.units, units[: last + 1])
        if prune_norm or (cut and not self._norm_fits(last)):
            self.norm = nn.Identity()
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:  # a head of a family's own goes as a whole, layers before its pooling too
            self.head = self.bare_head()
            self.num_classes, self.head_hidden_size = 0, self.num_features
        return take

    def bare_head(self) -> nn.Module:
        """A head that gives the features as they are, until `reset_classifier`."""
        return ClassifierHead(self.num_features, 0, "", input_fmt="NHWC", **get_device_dtype(self))

    def _norm_fits(self, index: int) -> bool:
        """Whether the final norm is of the width of unit `index` and meant for it."""
        raise NotImplementedError

    def forward_unit(self, unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return unit(x)

    def as_map(self, x: torch.Tensor) -> torch.Tensor:
        """The map (B, H, W, C) in what goes from unit to unit: that itself, or one of several streams."""
        return x

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """What the last unit gives, to what `forward_features` does."""
        return self.norm(x)

    # ---- Forward ----------------------------------------------------------------------------------------------------

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, H, W, num_features) to (B, num_classes), or to (B, head_hidden_size) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class FeatureMaps(FeatureGetterNet):
    """What `features_only=True` returns: NCHW maps of every family, pyramids and columns alike."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Linearly from 0 at the first block to `rate` at the last, split into stages."""
    flat = calculate_drop_path_rates(rate, sum(depths))
    return [flat[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]


def renamed(key: str, renames: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    """A checkpoint's key after `re.sub` by each pair of pattern and replacement, in order."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def keep_native(state_dict: Mapping) -> tuple[dict, bool]:
    """Unwraps a training script's envelope; also tells whether the keys are the model's own already.

    Returns:
        The flat state dict, and True if it needs no renaming (a headless checkpoint of ours counts).
    """
    for envelope in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(envelope), Mapping):
            state_dict = state_dict[envelope]
            break
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return state_dict, any(key.startswith("stem.") for key in state_dict)
