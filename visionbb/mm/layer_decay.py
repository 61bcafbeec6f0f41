"""Layer-wise learning-rate decay for any timm model, and weight decay where it belongs."""
from __future__ import annotations

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .backbone import TimmBackbone

# Tables and states of more than one axis that papers keep from weight decay, by the last part of their names.
NO_DECAY = {
    "pos_embed", "absolute_pos_embed", "cls_token", "rpb", "relative_position_bias_table", "A_log", "A_logs", "D", "Ds",
}  # fmt: skip


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Learning rate of a layer: lr * layer_decay ** (layers above it); of everything but the backbone: lr.

    Layers are those of timm's `group_matcher`: the stem, then each block. No weight decay on what has one axis (norms,
    biases, layer scale), on what the model's `no_weight_decay` names, on position-bias tables and state-space A and D.

    `paramwise_cfg` takes `layer_decay` alone (default 1: the weight-decay rules without the rest):

        optim_wrapper = dict(constructor="visionbb.TimmLayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.7), ...)

    Method: BEiT (https://arxiv.org/abs/2106.08254), after ELECTRA.

    Raises:
        ValueError: another key, a decay outside (0, 1], or a detector whose backbone is no `TimmBackbone`.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if unknown := set(self.paramwise_cfg) - {"layer_decay"}:
            raise ValueError(f"paramwise_cfg takes layer_decay alone here, got {', '.join(sorted(unknown))}")
        self.paramwise_cfg.setdefault("layer_decay", 1.0)
        if not 0 < self.paramwise_cfg["layer_decay"] <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.paramwise_cfg['layer_decay']}")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, TimmBackbone):
            raise ValueError(f"the model's backbone must be a visionbb.TimmBackbone, got {type(backbone).__name__}")
        ids = {f"backbone.{name}": i for name, i in backbone.layer_ids().items()}
        exempt = {f"backbone.{name}" for name in backbone.no_weight_decay()}
        top = max(ids.values()) + 1
        groups: dict[tuple[int, bool], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = ids.get(name, top)
            decays = parameter.ndim > 1 and name not in exempt and name.rpartition(".")[2] not in NO_DECAY
            scale = self.paramwise_cfg["layer_decay"] ** (top - layer)
            group = groups.setdefault((layer, decays), dict(params=[], lr=self.base_lr * scale, lr_scale=scale))
            if not decays:
                group["weight_decay"] = 0.0
            group["params"].append(parameter)
        params.extend(groups[key] for key in sorted(groups))
        print_log(
            f"layer decay {self.paramwise_cfg['layer_decay']}: {top} layers and the heads, {len(params)} groups",
            logger="current",
        )
