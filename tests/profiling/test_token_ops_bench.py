from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from visionbb.profiling import bench_op
from visionbb.profiling.op_bench import Contestant, Unavailable, results_table
from visionbb.profiling.ops import OPS, column_mean, token_match, token_merge

CPU = torch.device("cpu")
SMALL = {
    "token_match": token_match.Case(21, 8), "token_merge": token_merge.Case(21, 15, 8),
    "attention_column_mean": column_mean.Case(21, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_contestants_compute_the_same(name, dtype):
    names = [n for n in OPS[name].contestants if n != "triton"]
    results = bench_op(OPS[name], SMALL[name], batch_size=3, dtype=dtype, contestants=names, repeats=1, warmup=0)
    assert [r.contestant for r in results if not r.wrong and r.forward_ms] == names
    differentiable = name == "token_merge"
    assert all((r.train_ms is not None) == differentiable for r in results)
    headers = [column.header for column in results_table(name, results).columns]
    assert ("forward+backward ms" in headers) == differentiable


def test_wrong_gradients_are_found_where_some_inputs_have_none():
    def wrong(case, device):
        merge = token_merge.ours(case)
        return lambda x, size, index: merge(x.detach(), size, index) + 0 * x.sum()

    op = replace(OPS["token_merge"], contestants={"wrong": Contestant(wrong)})
    (result,) = bench_op(op, SMALL["token_merge"], batch_size=2)
    assert result.wrong


@pytest.mark.parametrize("name", SMALL)
def test_gpu_contestants_say_so_on_the_cpu(name):
    with pytest.raises(Unavailable, match="CUDA"):
        OPS[name].contestants["triton"].prepare(SMALL[name], CPU)


def test_cases_are_those_of_plain_vision_transformers():
    assert [str(case) for case in OPS["token_match"].cases][:2] == ["n197 d64", "n197 d384"]
    assert str(OPS["token_merge"].cases[0]) == "n197-184 c384"
    assert str(OPS["attention_column_mean"].cases[-1]) == "n4096 h12"
    assert token_match.moved_bytes(token_match.Case(10, 4), 2, 4) == 2 * (10 * 4 * 4 + 5 * 12)
