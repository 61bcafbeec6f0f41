"""The launches that reductions of plain vision transformers make, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from .._aot import TYPES, Case
from .triton import columns_launch, lse_launch

IMAGES, HEADS = 16, 12
MODELS = {
    197: ("deit_small_patch16_224", "vit_base_patch16_224"), 1369: ("vit_large_patch14_dinov2",), 4096: ("samvit_base",)
}
HEAD_DIMS = (32, 64, 80)


def cases() -> Iterator[Case]:
    """With sizes and query weights, and without; in bfloat16 and float32."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, models in MODELS.items():
            for d in HEAD_DIMS:
                with torch.device("meta"):
                    q, k, _ = torch.empty(IMAGES, tokens, 3, HEADS, d, dtype=dtype).permute(2, 0, 3, 1, 4)
                    rows, bias = torch.empty(IMAGES, HEADS, tokens), torch.empty(IMAGES, tokens)
                launches = (
                    lse_launch(q, k, None, rows, 1.0), columns_launch(q, k, None, None, rows, rows, 1.0),
                    lse_launch(q, k, bias, rows, 1.0), columns_launch(q, k, bias, rows, rows, rows, 1.0),
                )
                for launch in launches:
                    a = launch.arguments
                    work = (a["tiles"] * a["TILE"] / tokens) ** 2 * -(-d // a["BLOCK_D"]) * a["BLOCK_D"] / d
                    used = models if d == 64 else ()
                    yield Case("attention_column_mean", f"{tokens} d{d}", used, TYPES[dtype], launch, work)
