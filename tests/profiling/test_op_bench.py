from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from visionbb import kernels
from visionbb.profiling import bench_op
from visionbb.profiling.op_bench import Contestant, OpBench, Unavailable, results_table
from visionbb.profiling.ops import OPS, na2d

CPU = torch.device("cpu")


def scale_inputs(case, batch_size, device, dtype):
    return (
        torch.randn(batch_size, 4, device=device, dtype=dtype, requires_grad=True),
        torch.randn(4, device=device, dtype=dtype, requires_grad=True),
    )


def absent(case, device):
    raise Unavailable("not today")


def no_backward(case, device):
    def function(x, w):
        raise NotImplementedError("forward only")

    return function


SCALE = OpBench(
    cases=("only",),
    inputs=scale_inputs,
    batched=1,
    reference=lambda case: lambda x, w=None: x * (1 if w is None else w),
    contestants={
        "absent": Contestant(absent),
        "right": Contestant(lambda case, device: lambda x, w: w * x),
        "wrong": Contestant(lambda case, device: lambda x, w: w * x + 0.1),
        "wrong gradient": Contestant(lambda case, device: lambda x, w: (w * x).detach() + 0 * (w * x)),
        "wrong last image": Contestant(lambda case, device: lambda x, w: torch.cat([x[:-1] * w, x[-1:]]) + 0 * w),
        "no backward": Contestant(no_backward),
        "partial": Contestant(lambda case, device: lambda x: x.clone(), takes=1),
    },
    moved_bytes=lambda case, batch_size, element: 2 * 4 * batch_size * element,
)


def test_only_right_contestants_are_timed():
    results = {r.contestant: r for r in bench_op(SCALE, "only", batch_size=3, repeats=2)}
    assert list(results) == list(SCALE.contestants)
    assert {n for n, r in results.items() if r.wrong} == {"wrong", "wrong gradient", "wrong last image"}
    assert {n for n, r in results.items() if r.forward_ms is not None} == {"right", "partial"}
    assert (results["absent"].note, results["no backward"].note) == ("not today", "forward only")
    assert results["partial"].note == "takes 1 of the 2 inputs"
    assert results_table("scale", list(results.values())).row_count == 2

    right, partial = results["right"], results["partial"]
    assert right.forward_speedup == right.train_speedup == 1  # the first that was timed is the baseline
    assert partial.forward_speedup == pytest.approx(right.forward_ms / partial.forward_ms)
    assert right.gbytes_per_sec == pytest.approx(2 * 4 * 3 * 4 / (right.forward_ms * 1e6))
    assert right.forward_extra_mb == pytest.approx(3 * 4 * 4 / 1e6)
    assert right.error < 1e-6


def test_unknown_contestants_are_named():
    with pytest.raises(ValueError, match="unknown contestants fast; this op has absent, right"):
        bench_op(SCALE, "only", contestants=["right", "fast"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(9, 2, 1, 5, 16), (9, 1, 2, 3, 8), (6, 2, 2, 3, 8)], ids=str)
def test_contestants_of_na2d_compute_the_same(case, dtype):
    names = ["gather", "dense", "portable"]
    results = bench_op(
        OPS["na2d"], na2d.Case(*case), batch_size=3, dtype=dtype, contestants=names, repeats=1, warmup=0
    )
    assert [r.contestant for r in results if not r.wrong and r.forward_ms] == names


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [(8, 2, 1, 3, 16), (12, 1, 3, 3, 16)], ids=str)
def test_flex_form_of_the_neighborhood(case):
    """Uncompiled, where FlexAttention has a forward pass on the CPU."""
    case = na2d.Case(*case)
    qkv, rpb = (t.detach() for t in na2d.inputs(case, 2, CPU, torch.float32))
    with kernels.use("reference"):
        want = na2d.ours(case)(qkv, rpb)
    torch.testing.assert_close(na2d.flex_form(case, CPU, flex_attention)(qkv, rpb), want)


def test_cases_are_the_layers_of_the_tiny_models():
    names = [str(case) for case in OPS["na2d"].cases]
    assert names[:2] == ["56x56 h2 k7 d1", "56x56 h2 k7 d8"]
    assert len(names) == len(set(names)) == 7
    # 8 images, float32: 4 tensors of 56 * 56 * 2 * 32.
    assert na2d.moved_bytes(OPS["na2d"].cases[0], 8, 4) == 4 * 8 * 56 * 56 * 64 * 4


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_gpu_contestants_say_so_on_the_cpu(name):
    with pytest.raises(Unavailable, match=r"CUDA|CPU"):
        OPS["na2d"].contestants[name].prepare(na2d.Case(9, 1, 1), CPU)
