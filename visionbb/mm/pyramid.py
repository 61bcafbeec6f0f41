"""Feature pyramid for plain ViTs: all scales from one map."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps at strides 4, 8, 16 and 32 from the last map of a plain ViT, each resized by itself: no FPN.

    ViTDet (https://arxiv.org/abs/2203.16527), section 3: transposed convolutions up, max pooling down, then a 1x1 and
    a 3x3 convolution with layer norms. A neck, between `TimmBackbone` and the head:

        backbone=dict(type="visionbb.TimmBackbone", model_name="vit_base_patch16_224", out_indices=(-1,))
        neck=dict(type="visionbb.SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5)

    Args:
        in_channels: of the backbone's last output.
        out_channels: of every map.
        scale_factors: 4, 2, 1 or 0.5, of the resolution of each output over the input's. A patch size of 16 gives
            strides 4, 8, 16, 32.
        num_outs: maps in all; those beyond the scale factors are the last one, subsampled by 2 each.

    Raises:
        ValueError: another scale factor; fewer outputs than scale factors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 4,
    ):
        super().__init__()
        if num_outs < len(scale_factors):
            raise ValueError(f"num_outs must be at least {len(scale_factors)}, the scale factors, got {num_outs}")
        self.num_outs = num_outs
        self.levels = nn.ModuleList(_level(in_channels, out_channels, factor) for factor in scale_factors)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The last of `inputs`, (B, in_channels, H, W), to maps (B, out_channels, H * factor, W * factor)."""
        maps = [level(inputs[-1]) for level in self.levels]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)


def _level(dim: int, out_dim: int, factor: float) -> nn.Sequential:
    if factor == 4:
        half, quarter = dim // 2, dim // 4
        resize = [nn.ConvTranspose2d(dim, half, 2, 2), LayerNorm2d(half), nn.GELU(),
                  nn.ConvTranspose2d(half, quarter, 2, 2)]  # fmt: skip
    elif factor == 2:
        quarter = dim // 2
        resize = [nn.ConvTranspose2d(dim, quarter, 2, 2)]
    elif factor == 1:
        quarter, resize = dim, []
    elif factor == 0.5:
        quarter, resize = dim, [nn.MaxPool2d(2, ceil_mode=True)]
    else:
        raise ValueError(f"scale_factors must be 4, 2, 1 or 0.5, got {factor}")
    return nn.Sequential(
        *resize,
        nn.Conv2d(quarter, out_dim, 1, bias=False),
        LayerNorm2d(out_dim),
        nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
        LayerNorm2d(out_dim),
    )
