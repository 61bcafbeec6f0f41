"""Ahead-of-time compilation of the kernels that reduce tokens: sound, and one binary for all numbers of tokens."""
from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions do not compile"
)

if os.environ.get("TRITON_INTERPRET") != "1":
    from visionbb.kernels import _aot
    from visionbb.kernels.column_mean.report import cases as column_mean
    from visionbb.kernels.token_match.report import cases as token_match
    from visionbb.kernels.token_merge.report import cases as token_merge

    OPS = {"token_match": token_match, "token_merge": token_merge, "attention_column_mean": column_mean}

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that a program may have


def of_shape(op: str, start: str, dtype: str = "bf16"):
    """The last ones of a shape: with every optional input."""
    found = [case for case in OPS[op]() if case.shape.startswith(start) and case.dtype == dtype]
    last = {case.launch.kernel.__name__: case.launch for case in found}
    return list(last.values())


@pytest.mark.parametrize(("target", "matrix"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("gfx942", "mfma")])
@pytest.mark.parametrize(("op", "shape", "kernels"), [
    ("token_match", "98x99 d384", 1), ("attention_column_mean", "197 d64", 2), ("token_merge", "197->184 c384", 2),
])
def test_kernels_compile_for_every_target(op, shape, kernels, target, matrix):
    launches = of_shape(op, shape)
    assert len(launches) == kernels
    for launch in launches:
        build = _aot.build(launch, target)
        assert build.sound, build
        assert build.shared <= SHARED[target]
        assert (matrix in build.matrix) == (op != "token_merge")


@pytest.mark.parametrize(("op", "shape"), [("token_match", "98x99 d1024"), ("attention_column_mean", "197 d80")])
def test_exact_products_stay_off_the_tensor_cores(op, shape):
    for launch in of_shape(op, shape, "fp32"):
        build = _aot.build(launch, "sm_80")
        assert build.sound, build
        assert not build.matrix


@pytest.mark.parametrize("op", ["token_match", "token_merge", "attention_column_mean"])
def test_cases_cover_the_models_with_one_binary_for_all_tokens(op):
    listed = list(OPS[op]())
    assert {case.dtype for case in listed} == {"bf16", "fp32"}
    assert {"deit_small_patch16_224", "vit_large_patch14_dinov2"} <= {m for case in listed for m in case.models}
    assert all(case.work >= 1 for case in listed)
    tokens = {case.shape.split(" ")[0] for case in listed}
    assert len(tokens) == 3
    binaries = {(case.launch.kernel.__name__, _aot.source(case.launch).hash()) for case in listed}
    assert len(binaries) <= len(listed) / len(tokens)
    assert {case.op for case in listed} == {op}
