"""The launches that reductions of plain vision transformers make, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from .._aot import TYPES, Case
from .triton import match_launch

IMAGES = 16
TOKENS = (197, 1369, 4096)  # of a ViT at 224 pixels, of ViT-L/14 at 518, of SAM's encoder; every other one is a source
# MCTF compares tokens, ToMe the mean keys of the heads, whatever the model.
MODELS = {384: "deit_small_patch16_224", 768: "vit_base_patch16_224", 1024: "vit_large_patch14_dinov2"}
WIDTHS = {64: tuple(MODELS.values())} | {width: (model,) for width, model in MODELS.items()}


def cases() -> Iterator[Case]:
    """With and without offsets, in bfloat16 and float32."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in TOKENS:
            N, M = tokens // 2, tokens - tokens // 2
            for D, models in WIDTHS.items():
                with torch.device("meta"):
                    x = torch.empty(IMAGES, tokens, D, dtype=dtype)
                    row, column = torch.empty(IMAGES, N), torch.empty(IMAGES, M)
                    for offset in (None, column):
                        launch, *_ = match_launch(x[:, 1::2], x[:, ::2], row, column, offset)
                        a = launch.arguments
                        work = a["tiles"] * a["SOURCES"] / N * a["splits"] * a["share"] / M
                        shape = f"{N}x{M} d{D}" + " offset" * (offset is not None)
                        yield Case("token_match", shape, models, TYPES[dtype], launch, work)
