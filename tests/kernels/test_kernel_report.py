"""Ahead-of-time compilation, without a GPU: kernels of the zoo are sound, and the report says so when one is not."""
from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
TOOL = Path(__file__).parents[2] / "tools" / "kernel_report.py"
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions do not compile"
)

if os.environ.get("TRITON_INTERPRET") != "1":
    from visionbb.kernels import _aot
    from visionbb.kernels.neighborhood.report import MAPS, cases, launches


@pytest.fixture(scope="module")
def forward():
    launch, _ = next(launches(56, 7, 1, torch.bfloat16))
    return launch


@pytest.mark.parametrize(("target", "matrix"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("gfx942", "mfma")])
def test_forward_compiles_for_every_target(forward, target, matrix):
    build = _aot.build(forward, target)
    assert build.sound, build
    assert build.matrix[matrix] > 0
    assert 32 <= build.registers <= 255
    assert build.shared > 0


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_backward_compiles(number, target):
    launch, _ = list(launches(28, 7, 4, torch.bfloat16))[number]
    build = _aot.build(launch, target)
    assert build.sound, build


def test_exact_products_stay_off_the_tensor_cores():
    launch, _ = next(launches(56, 7, 1, torch.float32))
    build = _aot.build(launch, "sm_90")
    assert build.sound, build
    assert not build.matrix


def test_spills_and_failures_are_not_sound(forward):
    build = _aot.build(forward._replace(registers=64), "sm_80")
    assert build.spills > 0
    assert not build.sound
    build = _aot.build(forward._replace(arguments=forward.arguments | {"TILE_H": 3}), "sm_90")
    assert build.error.startswith("CompilationError")
    assert not build.sound


def test_the_tool_fails_if_a_kernel_does(forward, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("kernel_report", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def serve(launch):
        monkeypatch.setattr(_aot, "cases", lambda: [_aot.Case("op", "56²", ("model",), "bf16", launch, 4.0)])

    serve(forward)
    assert tool.main(["--target", "sm_80", "--json", str(tmp_path / "report.json")]) == 0
    (row,) = json.loads((tmp_path / "report.json").read_text())
    assert row["spills"] == 0
    assert row["shapes"][0]["models"] == ["model"]
    serve(forward._replace(registers=64))
    assert tool.main(["--target", "sm_80"]) == 1
    with pytest.raises(SystemExit):
        tool.main(["--model", "none_such"])


def test_shapes_share_binaries(monkeypatch):
    monkeypatch.setattr(_aot, "build", lambda launch, target: _aot.Build(registers=1))
    listed = list(cases())
    rows = list(_aot.report(listed, ["sm_90"]))
    assert sum(len(row.cases) for row in rows) == len(listed)
    assert len(rows) < len(listed) / 2
    for row in rows:
        assert len({case.launch.kernel for case in row.cases}) == 1
        assert len({case.launch.arguments["ROWS"] for case in row.cases}) == 1


def test_cases_cover_every_model_and_map():
    listed = list(cases())
    assert {case.op for case in _aot.cases()} >= {
        "neighborhood", "dwconv", "linear_attention", "rotary2d", "ssd", "bi_wkv", "scan"
    }
    assert {case.dtype for case in listed} == {"bf16", "fp32"}
    for maps in MAPS:
        for side in maps.sides:
            shapes = {case.shape for case in listed if set(maps.models) <= set(case.models)}
            assert any(shape.startswith(f"{side}²") for shape in shapes)
    assert all(case.work >= 1 for case in listed)


def test_launches_specialise_as_tritons_launcher_does(forward):
    source = _aot.source(forward)
    names = list(source.signature)
    assert source.signature["q"] == "*bf16"
    assert source.signature["lse"] == "*fp32"
    assert source.signature["H"] == "i32"  # 56 is a run-time size, and so would 64 be
    assert source.signature["dilation_h"] == "constexpr"  # 1
    strides = names.index("q_strides")
    assert source.signature["q_strides"] == ("i32",) * 4
    assert source.attrs[(strides, 3)] == [["tt.divisibility", 16]]  # head_dim 32
    assert (names.index("H"),) not in source.attrs
