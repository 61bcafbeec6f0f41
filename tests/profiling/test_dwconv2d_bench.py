from __future__ import annotations

import pytest
import torch

from visionbb.profiling import bench_op
from visionbb.profiling.op_bench import Unavailable
from visionbb.profiling.ops import OPS, dwconv2d


@pytest.mark.parametrize("case", [(9, 4, 5, 1, True), (6, 4, 3, 2)], ids=str)
def test_contestants_compute_the_same(case):
    names = ["channels_last", "nchw", "portable"]
    results = bench_op(
        OPS["dwconv2d"], dwconv2d.Case(*case), batch_size=3, contestants=names, repeats=1, warmup=0
    )
    assert [r.contestant for r in results if not r.wrong and r.forward_ms] == names


def test_cases():
    names = [str(case) for case in OPS["dwconv2d"].cases]
    assert names[0] == "56x56 c64 k3 d1 residual"
    assert len(names) == len(set(names))
    # 8 images, float32: 56 * 56 * 64 read and written.
    assert dwconv2d.moved_bytes(OPS["dwconv2d"].cases[0], 8, 4) == 2 * 8 * 56 * 56 * 64 * 4


def test_triton_needs_a_gpu():
    with pytest.raises(Unavailable, match="CUDA"):
        OPS["dwconv2d"].contestants["triton"].prepare(dwconv2d.Case(9, 4, 3), torch.device("cpu"))
