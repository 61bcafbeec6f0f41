"""The scans' part of the ahead-of-time report: what models run is in it, and compiles."""
from __future__ import annotations

import os

import pytest
import timm
import torch

import visionbb  # noqa: F401  (registers the models)
from visionbb.mixers import state_space

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions do not compile"
)

if os.environ.get("TRITON_INTERPRET") != "1":
    from visionbb.kernels import _aot
    from visionbb.kernels.scan.report import cases, grouped, launches, routed


@pytest.mark.parametrize("name", ["vmamba_base_s2l15", "vanilla_vmamba_tiny", "medmamba_tiny"])
def test_maps_of_a_model_are_listed(name, monkeypatch):
    found, op = set(), state_space.ss2d

    def note(x, proj, dt_weight, dt_bias, A, D, routes, **options):
        assert len(routes) == 4
        H, W, channels = x.shape[1:]
        found.add(f"{H}x{W} d{channels} n{A.shape[2]} r{dt_weight.shape[2]} {options.get('merge', 'sum')}")
        return op(x, proj, dt_weight, dt_bias, A, D, routes, **options)

    monkeypatch.setattr(state_space, "ss2d", note)
    with torch.device("meta"), torch.no_grad():
        timm.create_model(name).eval()(torch.empty(1, 3, 224, 224))
    listed = {case.shape for case in cases() if name in case.models}
    assert found
    assert found <= listed


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kind", ["routes", "groups"])
def test_compiles_without_spills(kind, target):
    if kind == "routes":  # one image: in chunks
        listed = list(launches(routed(1, 60_800, 60_800, 192, 6, 16, "all", torch.bfloat16), "sum"))
        names = ["summary", "carry", "output", "summary", "carry", "carry", "gradient"]
    else:
        listed = list(launches(grouped(64, 197, 1536, 16, True, torch.bfloat16), "groups"))
        names = ["output", "summary", "gradient"]
    assert [launch.kernel.__name__.removesuffix("_kernel") for launch in listed] == names
    for launch in listed:
        build = _aot.build(launch, target)
        assert build.sound, (launch.kernel.__name__, build)
        if target != "gfx942" and launch.kernel.__name__ == "output_kernel":
            assert bool(build.matrix) == (kind == "routes")  # low-rank time steps


def test_one_binary_serves_all_sizes():
    def sources(*sizes):
        return {_aot.source(launch).hash() for launch in launches(routed(*sizes, "all", torch.bfloat16), "sum")}

    small = sources(64, 49, 49, 1024, 64, 1)
    assert len(small) == 3  # output, summary, gradient
    assert small == sources(128, 196, 196, 384, 24, 16)


def test_cases_cover_the_families():
    listed = list(cases())
    assert {case.dtype for case in listed} == {"bf16", "fp32"}
    assert all(case.work >= 1 for case in listed)
    for model, shape in {
        "vmamba_tiny": "200x304 d96 n1 r6 sum", "local_vmamba_small": "7x7 d1536 n16 r48 stack",
        "efficient_vmamba_tiny": "28x28 d192 n16 r6 scatter", "plainmamba_l3": "l196 d896 n16 r28 u",
        "vim_base": "l197 d1536 n16 reversed", "mambavision_tiny": "l49 d320 n8", "local_vim_tiny": "l196 d384 n16",
    }.items():
        assert shape in {case.shape for case in listed if model in case.models}
