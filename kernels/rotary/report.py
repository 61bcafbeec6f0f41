"""The launches that turn queries and keys of the zoo's softmax attentions, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from .._aot import TYPES, Case
from .table import Rotary
from .triton import rotary_launch

IMAGES = 64
# Late stages of RAVLT, MAViT and NaLaFormer at 224 pixels and in the detectors: heads, head_dim, models.
MAPS = ((14, 14), (7, 7), (50, 84), (25, 42))
_SIZES = ("tiny", "small", "base", "large")
USES = (
    (4, 64, tuple(f"{family}_{size}" for family in ("ravlt", "mavit", "nalaformer") for size in _SIZES)),
    (4, 32, ("nalaformer_xtiny",)),
)


def cases() -> Iterator[Case]:
    """Forward and backward, on a chunk of the projection and on a gradient, in all types."""
    for dtype, name in TYPES.items():
        for heads, head_dim, models in USES:
            rotary = Rotary.closed(head_dim)
            for H, W in MAPS:
                with torch.device("meta"):
                    out = torch.empty(IMAGES, H, W, heads, head_dim, dtype=dtype)
                    x = torch.empty(IMAGES, H, W, 4, heads, head_dim, dtype=dtype)[:, :, :, 0]
                    for launch in (rotary_launch(x, out, rotary, False), rotary_launch(out, out, rotary, True)):
                        a = launch.arguments
                        work = a["tiles"] * a["TOKENS"] / (H * W) * a["BLOCK_D"] / head_dim
                        yield Case("rotary2d", f"{H}x{W} d{head_dim}", models, name, launch, work)
