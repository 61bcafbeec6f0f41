from __future__ import annotations

import pytest
import torch

from visionbb.profiling import bench_op
from visionbb.profiling.op_bench import Unavailable
from visionbb.profiling.ops import OPS, selective_scan, ss2d


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("ss2d", ss2d.Case(5, 8, 1, 3)), ("ss2d", ss2d.Case(4, 8, 2, 3, "snake")),
        ("selective_scan", selective_scan.Case(11, 8, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contestants_compute_the_same(op, case, dtype):
    names = ["loop", "doubling", "portable"]
    results = bench_op(OPS[op], case, batch_size=3, dtype=dtype, contestants=names, repeats=1, warmup=0)
    assert [r.contestant for r in results if not r.wrong and r.forward_ms] == names


def test_cases():
    assert str(OPS["ss2d"].cases[0]) == "56x56 d96 n1 r6 cross"
    assert str(OPS["selective_scan"].cases[0]) == "l197 d384 n16"
    # 8 images in bfloat16: 96 channels and 4 * 8 of the projection read, 96 written in float32.
    assert ss2d.moved_bytes(OPS["ss2d"].cases[0], 8, 2) == 8 * 56 * 56 * (2 * (96 + 32) + 4 * 96)
    assert selective_scan.moved_bytes(OPS["selective_scan"].cases[0], 8, 2) == 2 * 8 * 197 * (4 * 384 + 2 * 16)


@pytest.mark.parametrize("op", ["ss2d", "selective_scan"])
def test_triton_needs_a_gpu(op):
    with pytest.raises(Unavailable, match="CUDA"):
        OPS[op].contestants["triton"].prepare(OPS[op].cases[0], torch.device("cpu"))


def test_mamba_ssm_says_why_it_cannot_run():
    with pytest.raises(Unavailable, match="mamba_ssm"):
        OPS["selective_scan"].contestants["mamba_ssm"].prepare(selective_scan.Case(9, 8), torch.device("cpu"))
