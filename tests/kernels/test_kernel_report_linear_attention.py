"""Ahead-of-time compilation of linear attention and the rotary embedding: sound, and one binary for all sizes."""
from __future__ import annotations

import os
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions do not compile"
)

if os.environ.get("TRITON_INTERPRET") != "1":
    from visionbb.kernels import _aot
    from visionbb.kernels.linear_attention.report import USES, cases, launches
    from visionbb.kernels.rotary import report as rotary

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that a program may have
KERNELS = ("sums", "queries", "query_gradient", "sums of gradients", "key_gradient")


def launch_of(model: str, kernel: str, dtype: torch.dtype, H: int = 56, W: int = 56):
    use = next(use for use in USES if model in use.models)
    return list(launches(use, H, W, dtype))[KERNELS.index(kernel)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("target", "matrix"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("gfx942", "mfma")])
def test_kernels_compile_for_every_target(kernel, target, matrix):
    build = _aot.build(launch_of("ravlt_tiny", kernel, torch.bfloat16), target)
    assert build.sound, build
    assert build.matrix[matrix] > 0
    assert build.shared <= SHARED[target]


@pytest.mark.parametrize(
    ("model", "kernel", "dtype"),
    [
        ("ravlt_base", "key_gradient", torch.float32),  # the most registers
        ("mavit_base", "sums", torch.float32),
        ("nalaformer_base", "key_gradient", torch.bfloat16),
        ("mila_tiny", "query_gradient", torch.float16),
    ],
    ids=str,
)
def test_the_largest_do_not_spill(model, kernel, dtype):
    build = _aot.build(launch_of(model, kernel, dtype), "sm_80")
    assert build.sound, build


def test_float32_runs_on_the_tensor_cores():
    """In three parts: six products for each of bfloat16."""
    counts = [
        _aot.build(launch_of("l2vit_tiny", "sums", dtype), "gfx942").matrix["mfma"]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert counts[1] >= 6 * counts[0] // 2  # in smaller blocks of channels


def test_rotary_compiles():
    launch = next(iter(rotary.cases())).launch
    for target in _aot.TARGETS:
        assert _aot.build(launch, target).sound


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_binary_serves_all_sizes(kernel):
    """Maps, batches and numbers of heads are run-time sizes."""
    for model in ("ravlt_tiny", "mila_tiny", "l2vit_tiny"):
        sources = {
            _aot.source(launch_of(model, kernel, torch.bfloat16, H, W)).hash()
            for H, W in ((56, 56), (14, 14), (7, 7), (200, 334), (13, 91))
        }
        assert len(sources) == 1


def test_maps_share_binaries(monkeypatch):
    monkeypatch.setattr(_aot, "build", lambda launch, target: _aot.Build(registers=1))
    listed = [case for case in cases() if case.dtype == "bf16"]
    rows = list(_aot.report(listed, ["sm_90"]))
    assert sum(len(row.cases) for row in rows) == len(listed)
    binaries = defaultdict(set)
    for i, row in enumerate(rows):
        for case in row.cases:
            binaries[case.models, case.shape.split(" ")[1], row.kernel].add(i)
    for (_, _, kernel), found in binaries.items():
        assert len(found) <= (2 if kernel == "sums_kernel" else 1)  # sums of keys, and of gradients


def test_cases_cover_the_papers():
    listed = list(cases())
    assert {case.dtype for case in listed} == {"bf16", "fp16", "fp32"}
    assert all(case.work >= 1 for case in listed)
    for model, shapes in {
        "ravlt_tiny": ("56x56 d64", "28x28 d64", "200x334 d64"),
        "nalaformer_small": ("56x56 d128/64", "100x167 d128/64"),
        "nalaformer_base": ("56x56 d192/96",),
        "mila_tiny": ("56x56 d32", "7x7 d32", "200x334 d32"),
        "l2vit_base": ("56x56 d32", "7x7 d32"),
        "care_s1": ("14x14 d16", "7x7 d32"),
        "deit_mala": ("14x14 d64", "1x197 d64"),
    }.items():
        assert {case.shape for case in listed if model in case.models} >= set(shapes)
    assert {case.dtype for case in rotary.cases()} == {"bf16", "fp16", "fp32"}
