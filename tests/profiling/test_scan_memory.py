from __future__ import annotations

import pytest
import torch

from visionbb.kernels import scan_routes, ss2d, use
from visionbb.profiling import peak_memory


@pytest.mark.parametrize("routes", ["cross", "window7"])
@pytest.mark.parametrize("train", [False, True])
def test_memory_of_ss2d_grows_linearly_with_the_tokens(routes, train):
    """Beside its inputs, and whether its routes are scanned where they lie or gathered."""
    D, N, R = 16, 2, 2

    def bytes_per_token(side: int) -> float:
        table = scan_routes(routes, side, side)
        K = len(table)
        shapes = (1, side, side, D), (1, side, side, K * (R + 2 * N)), (K, D, R), (K, D), (K, D, N), (K, D)
        tensors = [torch.rand(shape, requires_grad=train) for shape in shapes]
        tensors[4] = -tensors[4]

        def call():
            with use("portable"):
                out = ss2d(*tensors, table)
                return torch.autograd.grad(out.sum(), tensors[:4]) if train else out

        call()  # the plan of a table is kept
        return peak_memory(call, "cpu") / side**2

    small, large = bytes_per_token(42), bytes_per_token(168)
    assert large < 1.1 * small
