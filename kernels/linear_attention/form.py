"""What the papers' linear attentions differ in."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..rotary import Rotary

FEATURE_MAPS = ("identity", "elu", "relu", "exp")
NORMALIZERS = ("div", "clamp", "additive", "none")


class Form(NamedTuple):
    feature_map: str  # of FEATURE_MAPS, applied to every channel of q and k
    normalizer: str  # of NORMALIZERS
    scale: float  # of the features of q
    eps: float
    rotary: Rotary | None  # of the numerator's features


def features(x: torch.Tensor, name: str) -> torch.Tensor:
    """A pointwise feature map as it is written."""
    if name == "elu":
        return F.elu(x) + 1
    if name == "relu":
        return x.relu()
    return x.exp() if name == "exp" else x
