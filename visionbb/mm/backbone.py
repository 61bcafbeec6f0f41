"""Any timm model, visionbb's included, as the backbone of a detector or a segmentor."""
from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from timm.models import group_parameters, load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import visionbb  # noqa: F401  (registers the models)

from ..reduction import reduce_tokens
from ..registry import MODELS

# What makes timm's models of fixed input size take any: keyword arguments by the module that defines the model.
_ANY_SIZE = {
    "vision_transformer": dict(dynamic_img_size=True, dynamic_img_pad=True),
    "deit": dict(dynamic_img_size=True, dynamic_img_pad=True),
    "eva": dict(dynamic_img_size=True, dynamic_img_pad=True),
    "swin_transformer": dict(strict_img_size=False),
    "swin_transformer_v2": dict(strict_img_size=False),
}


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Feature maps (B, C, H, W) of a timm model, each behind a layer norm of its own.

    The whole classification model is built, then cut down to what the maps need, so that no parameter is without a
    gradient (DistributedDataParallel) and the model's weights keep their names. Maps come from `forward_intermediates`,
    from which models that reduce their tokens return whole maps, too.

    Args:
        model_name: any name of `timm.list_models()`.
        out_indices: which of the model's intermediates: stages of a pyramid, blocks of a column; negative from the end.
        pretrained: start from timm's pretrained weights.
        checkpoint: start from this classification checkpoint, a file or a URL: the model's own key names, or the
            authors' where visionbb knows them; nothing may be missing or left over, the classifier apart.
        frozen_stages: how many stages (blocks of a column) to freeze; 0 freezes the stem alone, -1 nothing.
        norm_eval: keep batch norms of the model at their running statistics.
        with_cp: recompute activations in the backward pass to save memory.
        out_norm: layer norm on every output, not part of classification checkpoints.
        reduction: what `visionbb.reduction.reduce_tokens` takes beside the model, such as dict(method="tome", r=8);
            maps are whole all the same.
        **kwargs: to the model: `drop_path_rate`, `dilations`, ...

    Weights are loaded by `init_weights`, which mmengine's Runner calls before training.

    Attributes:
        channels, strides: of the outputs, in their order.

    Raises:
        ValueError: an unknown model name, a wrong out_indices or frozen_stages, both of pretrained and checkpoint.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: bool = False,
        checkpoint: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_norm: bool = True,
        reduction: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__()
        if not isinstance(pretrained, bool):
            raise ValueError(f"pretrained must be True or False, got {pretrained!r}; files are given as checkpoint=")
        if pretrained and checkpoint:
            raise ValueError("weights come from pretrained=True or from checkpoint=, not from both")
        self.model_name, self.model_args = model_name, kwargs
        self.pretrained, self.checkpoint = pretrained, checkpoint
        self.norm_eval = norm_eval
        self.model = self._create()

        info = list(self.model.feature_info)
        if not out_indices or not all(-len(info) <= i < len(info) for i in out_indices):
            raise ValueError(
                f"out_indices must be within the {len(info)} intermediates of {model_name}, got {tuple(out_indices)}"
            )
        self.out_indices = [i % len(info) for i in out_indices]
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=True, prune_head=True)
        self.channels = [info[i]["num_chs"] for i in self.out_indices]
        self.strides = [info[i]["reduction"] for i in self.out_indices]
        self.out_norms = nn.ModuleList(LayerNorm2d(c) if out_norm else nn.Identity() for c in self.channels)
        self.model.set_grad_checkpointing(with_cp)
        if reduction is not None:
            reduce_tokens(self.model, **reduction)
        self._freeze(frozen_stages)

    def _create(self, pretrained: bool = False) -> nn.Module:
        if not timm.is_model(self.model_name):
            close = difflib.get_close_matches(self.model_name, timm.list_models(), n=3)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(f"unknown model {self.model_name!r}{hint}")
        module = timm.model_entrypoint(self.model_name).__module__.removeprefix("timm.models.")
        return timm.create_model(self.model_name, pretrained, **{**_ANY_SIZE.get(module, {}), **self.model_args})

    # ---- Weights ----------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Loads the weights that `pretrained` or `checkpoint` asks for; without, the model's own initialisation stays.

        Raises:
            ValueError: the checkpoint does not fit the model; the message names the keys.
        """
        if self.pretrained or self.checkpoint:
            whole = self._create(self.pretrained)
            if self.checkpoint:
                load_classifier(whole, self.checkpoint)
            weights, own = whole.state_dict(), self.model.state_dict()
            # A reduction may have parameters, which no classification checkpoint knows.
            known = {key: weights[key] for key in own if not key.startswith("reducer.")}
            self.model.load_state_dict({**own, **known})
        self._is_init = True

    # ---- Frozen parts -----------------------------------------------------------------------------------------------

    def _freeze(self, stages: int) -> None:
        """Marks the stem and the first stages as not trained; remembers their modules."""
        groups = group_parameters(self.model, self.model.group_matcher(coarse=True))
        last = max(groups)
        if not -1 <= stages <= last:
            raise ValueError(f"frozen_stages must be within -1 and {last} for {self.model_name}, got {stages}")
        for i in range(stages + 1):
            for name in groups[i]:
                self.model.get_parameter(name).requires_grad_(False)
        self._frozen = [m for m in self.model.modules() if _all_frozen(m)] if stages >= 0 else []

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self.norm_eval:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    # ---- Groups of parameters ---------------------------------------------------------------------------------------

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter, by name: 0 for the stem, then block by block; output norms go with the last."""
        ids = group_parameters(self.model, self.model.group_matcher(), reverse=True)
        last = max(ids.values())
        return {
            **{f"model.{name}": i for name, i in ids.items()},
            **{f"out_norms.{name}": last for name, _ in self.out_norms.named_parameters()},
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the model keeps from weight decay."""
        own = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in own}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_chans, H, W) to maps (B, channels[i], H / strides[i], W / strides[i])."""
        maps = self.model.forward_intermediates(
            x, self.out_indices, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        return tuple(norm(m) for norm, m in zip(self.out_norms, maps, strict=True))


def _all_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def load_classifier(model: nn.Module, checkpoint: str | Path) -> None:
    """Loads a classification checkpoint strictly, but for the classifier, which may be of other classes or absent.

    Args:
        model: a whole timm model.
        checkpoint: file (.pth, .safetensors, ...) or URL; envelopes such as "model" or "state_dict_ema" are opened.

    Raises:
        ValueError: weights are missing, left over or of another shape; the message names them.
        FileNotFoundError: no such file.
    """
    if urlparse(str(checkpoint)).scheme in ("http", "https"):
        from timm.models._hub import download_cached_file

        checkpoint = download_cached_file(str(checkpoint))
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint {str(checkpoint)!r}")
    found = load_state_dict(str(checkpoint))
    found = {key.removeprefix("backbone."): value for key, value in found.items()}
    if hasattr(model, "checkpoint_filter_fn"):
        found = model.checkpoint_filter_fn(found, model)
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    found = {key: value for key, value in found.items() if not key.startswith(heads)}
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
    _require_same(found, wanted, str(checkpoint), model)
    nn.Module.load_state_dict(model, found, strict=False)


def _require_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str, model: nn.Module) -> None:
    problems = {
        "missing": [key for key in wanted if key not in found],
        "left over": [key for key in found if key not in wanted],
        "of another shape": [key for key in wanted if key in found and wanted[key].shape != found[key].shape],
    }
    if any(problems.values()):
        name = model.pretrained_cfg.get("architecture", type(model).__name__)
        told = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in problems.items()
            if keys
        )
        raise ValueError(f"checkpoint {path!r} does not fit {name}: {told}")
