"""Pictures of what a reduction did to an image."""
from __future__ import annotations

import torch

from .report import ReductionReport


def merged_patches(image: torch.Tensor, report: ReductionReport, index: int = 0) -> torch.Tensor:
    """An image (3, H, W) in which every token has one colour, the mean of its patches, and dropped ones are black.

    Tokens of more than one patch are outlined where they meet others.

    Args:
        image: values in [0, 1], as large as the model saw it.
        index: which image of the report this is.

    Returns:
        (3, H, W) in [0, 1].
    """
    rows, cols = report.grid
    _, H, W = image.shape
    y = torch.arange(H, device=image.device) * rows // H
    x = torch.arange(W, device=image.device) * cols // W
    source = report.source[index].to(image.device).view(rows, cols)[y[:, None], x]  # (H, W), the token of each pixel
    tokens = report.size.shape[1]
    flat = torch.where(source < 0, tokens, source).flatten()
    sums = image.new_zeros(3, tokens + 1).index_add(1, flat, image.flatten(1))
    colours = sums / flat.bincount(minlength=tokens + 1).clamp(min=1)
    colours[:, tokens] = 0
    picture = colours[:, flat].view(3, H, W)
    edge = torch.zeros(H, W, dtype=torch.bool, device=image.device)
    edge[1:] |= source[1:] != source[:-1]
    edge[:, 1:] |= source[:, 1:] != source[:, :-1]
    size = torch.cat((report.size[index], report.size.new_ones(1))).to(image.device)[flat].view(H, W)
    return torch.where(edge & (size > 1), 1.0, picture)
