"""The launches that reductions of plain vision transformers make, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from .._aot import TYPES, Case
from .triton import gradient_launch, merge_launch

IMAGES = 16
TOKENS = ((197, 184), (1369, 1229), (4096, 2048))  # before and after: ToMe's r = 13, a tenth, a half
WIDTHS = {
    384: ("deit_small_patch16_224",), 768: ("vit_base_patch16_224",), 1024: ("vit_large_patch14_dinov2",), 64: (),
}


def cases() -> Iterator[Case]:
    """Forward and backward; sizes as weights, without and with a gradient; bfloat16 and float32."""
    for dtype in (torch.bfloat16, torch.float32):
        for N, M in TOKENS:
            for C, models in WIDTHS.items():
                with torch.device("meta"):
                    x, merged = torch.empty(IMAGES, N, C, dtype=dtype), torch.empty(IMAGES, M, C, dtype=dtype)
                    weight, total = torch.empty(IMAGES, N), torch.empty(IMAGES, M)
                    index, starts = (torch.empty(n, dtype=torch.long) for n in (IMAGES * N, IMAGES * M + 1))
                launches = (
                    (merge_launch(x, index, starts, None, merged, total), M),
                    (merge_launch(x, index, starts, weight, merged, total), M),
                    (gradient_launch(merged, total, None, index, weight, None, total, x, None), N),
                    (gradient_launch(merged, total, x, index, weight, merged, total, x, weight), N),
                )
                for launch, tokens in launches:
                    a = launch.arguments
                    owned = a["ROWS"] if "ROWS" in a else a["TOKENS"]
                    work = a["tiles"] * owned / tokens * -(-C // a["BLOCK_C"]) * a["BLOCK_C"] / C
                    yield Case("token_merge", f"{N}->{M} c{C}", models, TYPES[dtype], launch, work)
