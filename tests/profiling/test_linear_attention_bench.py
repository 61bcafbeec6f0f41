from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from visionbb import kernels
from visionbb.profiling import bench_op
from visionbb.profiling.op_bench import Unavailable
from visionbb.profiling.ops import OPS, linear_attention

CPU = torch.device("cpu")
OP = OPS["linear_attention"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(9, 1, 16), (6, 3, 8, "map")], ids=str)
def test_contestants_compute_the_same(case, dtype):
    names = ["matmul", "dense", "portable"]
    case = linear_attention.Case(*case)
    results = bench_op(OP, case, batch_size=3, dtype=dtype, contestants=names, repeats=1, warmup=0)
    assert [r.contestant for r in results if not r.wrong and r.forward_ms] == names


def test_flash_bla_is_called_on_its_layout(monkeypatch):
    def decoupled_la(q, k, turned_q, turned_k, v, eps):
        assert q.shape == v.shape == (2, 3, 36, 8)  # (B, heads, tokens, head_dim)
        total = q @ k.mean(2, keepdim=True).transpose(2, 3)
        return turned_q @ (turned_k.transpose(2, 3) @ v / 36) / (total + eps)

    for name in ("flash_bla", "flash_bla.ops", "flash_bla.ops.linear_attn", "flash_bla.ops.linear_attn.decoupled"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flash_bla.ops.linear_attn.decoupled"].decoupled_la = decoupled_la
    case = linear_attention.Case(6, 3, 8, "map")
    (result,) = bench_op(OP, case, batch_size=2, contestants=["flash_bla"], repeats=1, warmup=0)
    assert not result.wrong
    assert result.forward_ms


def test_maps_too_large_for_the_definition_are_held_to_the_portable_path(monkeypatch):
    case = linear_attention.Case(6, 1, 8)
    monkeypatch.setattr(linear_attention, "DENSE_TOKENS", 35)
    with pytest.raises(Unavailable, match="36 x 36"):
        linear_attention.dense(case, CPU)
    inputs = linear_attention.inputs(case, 1, CPU, torch.float64)
    with kernels.use("reference"):
        torch.testing.assert_close(linear_attention.reference(case)(*inputs), linear_attention.ours(case)(*inputs))


def test_cases_are_the_layers_of_the_tiny_models_and_a_large_map():
    names = [str(case) for case in OP.cases]
    assert len(names) == len(set(names)) == 7
    assert names[0] == "56x56 h1 d64 rotary over head"
    assert names[5] == "7x7 h16 d32 rotary over map"
    assert OP.cases[-1].side ** 2 == 65536
    # 8 images, float32: 6 tensors of 56 * 56 * 64.
    assert linear_attention.moved_bytes(OP.cases[0], 8, 4) == 6 * 8 * 56 * 56 * 64 * 4


@pytest.mark.parametrize(("name", "message"), [("triton", "CUDA"), ("compiled", "CUDA"), ("flash_bla", "imported")])
def test_contestants_say_why_they_cannot_run(name, message):
    with pytest.raises(Unavailable, match=message):
        OP.contestants[name].prepare(linear_attention.Case(9, 1, 8), CPU)
