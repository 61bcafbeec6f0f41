from __future__ import annotations

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from torch import nn

from visionbb.mm import TimmBackbone


class Detector(BaseModule):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, 8, 1)


def optimizer(backbone: nn.Module, **paramwise) -> tuple[nn.Module, dict]:
    """The detector, and its parameters' (learning rate, weight decay) by name."""
    model = Detector(backbone)
    wrapper = build_optim_wrapper(model, dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
        constructor="visionbb.TimmLayerDecayConstructor",
        paramwise_cfg=paramwise,
    ))  # fmt: skip
    names = {id(p): name for name, p in model.named_parameters()}
    return model, {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
    }


def test_rates_fall_towards_the_stem():
    """nat_digits: stem 0, six blocks 1 to 6, the output norms with the last, the head above them all."""
    _, rates = optimizer(TimmBackbone("nat_digits"), layer_decay=0.5)
    expected = {
        "head.weight": 7, "backbone.out_norms.0.weight": 6, "backbone.model.stages.3.blocks.0.mlp.fc1.weight": 6,
        "backbone.model.stages.1.blocks.1.mlp.fc1.weight": 3, "backbone.model.stages.0.blocks.0.mlp.fc1.weight": 1,
        "backbone.model.stem.proj.0.weight": 0,
    }  # fmt: skip
    for name, layer in expected.items():
        assert rates[name][0] == pytest.approx(1e-3 * 0.5 ** (7 - layer)), name


@pytest.mark.parametrize("name", ["nat_digits", "ravlt_tiny", "swin_tiny_patch4_window7_224", "test_vit"])
def test_weight_decay_where_it_belongs(name):
    backbone = TimmBackbone(name, out_indices=(-1,))
    model, rates = optimizer(backbone)
    assert set(rates) == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        table = key.endswith(("rpb", "relative_position_bias_table", "pos_embed", "cls_token", "reg_token"))
        assert rates[key] == (1e-3, 0.0 if parameter.ndim == 1 or table else 0.05), key


def test_state_space_parameters():
    """A_logs and D of VMamba-like blocks have two axes and do not decay either."""
    backbone = TimmBackbone("nat_digits")
    block = backbone.model.stages[0].blocks[0]
    block.A_logs, block.Ds = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(4, 2))
    _, rates = optimizer(backbone)
    for name in ("A_logs", "Ds"):
        assert rates[f"backbone.model.stages.0.blocks.0.{name}"][1] == 0


def test_frozen_parameters_are_left_out():
    _, rates = optimizer(TimmBackbone("nat_digits", frozen_stages=2), layer_decay=0.9)
    assert not any(".stem." in name or ".stages.0." in name or ".stages.1." in name for name in rates)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 1.5"):
        optimizer(TimmBackbone("nat_digits"), layer_decay=1.5)
    with pytest.raises(ValueError, match="takes layer_decay alone here, got num_layers"):
        optimizer(TimmBackbone("nat_digits"), num_layers=12)
    with pytest.raises(ValueError, match=r"must be a visionbb.TimmBackbone, got Identity"):
        optimizer(nn.Identity())
