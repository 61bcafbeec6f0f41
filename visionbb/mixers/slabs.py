"""Wide maps a few entries at a time."""

from collections.abc import Callable

import torch

from ..kernels._dispatch import caches, eager_inference

WIDEST_HIDDEN = 2**25  # bytes: malloc hands larger blocks back to the system, which clears them page by page
SLAB = 2**20  # numbers of a hidden layer that stay in cache, a thread


def in_slabs(layers: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, hidden: int) -> torch.Tensor:
    """layers(x), of a few of x's entries (tokens, images) at a time where the map is wide and a CPU only infers.

    Args:
        hidden: numbers of the widest layers in memory at once, an entry.
    """
    if not x.is_cpu or torch.is_grad_enabled() or not eager_inference():
        return layers(x)
    # Asked last: no graph may come to depend on a size.
    if x.shape[0] * hidden * x.element_size() <= WIDEST_HIDDEN:
        return layers(x)
    return torch.cat([layers(slab) for slab in x.split(max(1, caches() * SLAB // hidden))])
