"""The Triton kernel of `token_match` against its definition.

It runs on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import token_match, use
from visionbb.kernels.token_match.limits import refuses

from .token_match_cases import arguments, cases, check

pytest.importorskip("triton")

from visionbb.kernels.token_match import triton as kernels

CASES = cases(images=2, tokens=(1, 140), channels=80)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel runs in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@runs_kernels
@settings(max_examples=20, deadline=None)
@given(CASES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans())
def test_kernel_equals_reference(case, dtype, split):
    args, kwargs = arguments(case, dtype, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SHARE", 64 if split else 1 << 20)
        got = kernels.token_match(*args, *kwargs.values())
    assert [x.dtype for x in got] == [torch.float32, torch.int64]
    check(got, args, kwargs, 1e-5)


@runs_kernels
@pytest.mark.parametrize("share", [64, 1 << 20])
def test_of_equals_the_first(share, monkeypatch):
    """Within a tile, between tiles, and between programs."""
    monkeypatch.setattr(kernels, "SHARE", share)
    src, dst = torch.eye(16, device=DEVICE).repeat(1, 3, 1), torch.eye(16, device=DEVICE).repeat(1, 20, 1)
    dst[:, 5:100] *= -1
    _, index = kernels.token_match(src, dst, None, None, "cosine")
    assert torch.equal(index[0].cpu(), torch.tensor([*range(5), *range(101, 112)]).repeat(3))


@runs_kernels
def test_destinations_are_split_where_sources_are_few():
    launch, score, _ = kernels.match_launch(
        *torch.randn(2, 1, 1000, 32, device=DEVICE), *torch.rand(2, 1, 1000, device=DEVICE), None
    )
    assert score.shape[1] == 4
    assert launch.arguments["splits"] * launch.arguments["share"] >= 1000
    _, score, _ = kernels.match_launch(
        *torch.randn(2, 128, 1000, 1, device=DEVICE), *torch.rand(2, 128, 1000, device=DEVICE), None
    )
    assert score.shape[1] == 1


@runs_kernels
def test_the_op_takes_the_kernel():
    src, dst = torch.randn(2, 20, 8, device=DEVICE).transpose(1, 2), torch.randn(2, 30, 20, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            results.append(token_match(src, dst, affinity="shifted"))
    torch.testing.assert_close(*results)
    with use("triton"):
        assert token_match(src[:0], dst[:0])[0].shape == (0, 8)
        with pytest.raises(RuntimeError, match="float16 and bfloat16, got"):
            token_match(src.double(), dst.double())


def test_reasons_to_refuse():
    assert refuses(torch.empty(1, 2, 3)) is None
    assert "got torch.float64" in refuses(torch.empty(1, 2, 3, dtype=torch.float64))
