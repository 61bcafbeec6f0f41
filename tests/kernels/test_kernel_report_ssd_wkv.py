"""Ahead-of-time compilation of state-space duality and bidirectional WKV: sound, and one binary for all sizes."""
from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions do not compile"
)

if os.environ.get("TRITON_INTERPRET") != "1":
    from visionbb.kernels import _aot
    from visionbb.kernels.ssd import report as ssd
    from visionbb.kernels.wkv import report as wkv


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_ssd_compiles(target):
    for launch in ssd.launches(ssd.USES[1], 0, 56 * 56, 64, torch.bfloat16):
        build = _aot.build(launch, target)
        assert build.sound, build
        assert build.matrix


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_wkv_compiles(target):
    """All but the largest kernel, the last one, which takes long."""
    for launch in list(wkv.launches(196, 192, torch.bfloat16))[:-1]:
        build = _aot.build(launch, target)
        assert build.sound, build


@pytest.mark.slow
def test_the_largest_does_not_spill():
    *_, launch = wkv.launches(196, 192, torch.bfloat16)
    build = _aot.build(launch, "sm_80")
    assert build.sound, build


def test_one_binary_serves_all_sizes():
    for launches in (
        [list(ssd.launches(ssd.USES[1], stage, L, 64, torch.bfloat16)) for stage, L in enumerate((3136, 784, 196))],
        [list(wkv.launches(L, 384, torch.bfloat16)) for L in (196, 577, 4096)],
    ):
        for same in zip(*launches, strict=True):
            assert len({_aot.source(launch).hash() for launch in same}) == 1


def test_cases_cover_the_models():
    for report, models in (
        (ssd, {"vssd_micro", "vssd_tiny", "vssd_small", "vssd_base"}),
        (wkv, {"vrwkv_tiny", "vrwkv_small", "vrwkv_base", "vrwkv_large"}),
    ):
        listed = list(report.cases())
        assert {model for case in listed for model in case.models} == models
        assert {case.dtype for case in listed} == {"bf16", "fp16", "fp32"}
        assert all(case.work >= 1 for case in listed)
