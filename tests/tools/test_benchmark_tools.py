from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool():
    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load


def test_profile_as_a_script(tmp_path):
    """As users start it: its own name must not shadow the standard library's `profile`."""
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "png")}
    done = subprocess.run(
        [sys.executable, str(TOOLS / "profile.py"), "test_vit", "test_resnet", "--batch-size", "2", "--quick",
         "--threads", "1", "--csv", paths["csv"], "--json", paths["json"], "--plot", paths["png"]],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test_vit" in done.stdout
    assert "test_resnet" in done.stdout
    assert done.stdout.count("peak memory MB") == 1
    assert done.stderr == ""
    assert len(paths["csv"].read_text().splitlines()) == 3
    assert json.loads(paths["json"].read_text())["environment"]["threads"] == 1
    assert paths["png"].stat().st_size > 1000


def test_every_tool_leaves_the_standard_library_visible():
    check = (
        "import runpy, sys\n"
        "for script in sys.argv[2:]:\n"
        "    sys.path.insert(0, sys.argv[1])\n"
        "    runpy.run_path(script, run_name='imported')\n"
        "    assert sys.argv[1] not in sys.path, script\n"
    )
    scripts = [str(p) for p in sorted(TOOLS.glob("*.py"))]
    assert scripts
    done = subprocess.run([sys.executable, "-c", check, str(TOOLS), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_model_bench(tool, capsys, tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--input-size", "64", "96"]
    tool("model_bench")(
        ["test_vit", "test_resnet", "--batch-size", "2", *sizes, "--repeats", "2", "--warmup", "0",
         "--baseline", "test_resnet", "--json", str(out)]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "over those of test_resnet" in printed
    assert "64 -> 96" in printed
    document = json.loads(out.read_text())
    assert document["settings"]["baseline"] == "test_resnet"
    rows = document["results"]
    assert {(r["model"], r["mode"], r["img_size"]) for r in rows} == {
        (m, mode, size) for m in ("test_vit", "test_resnet") for mode in ("forward", "train") for size in (64, 96)
    }
    assert all(r["ratio"] == 1 for r in rows if r["model"] == "test_resnet")


def test_model_bench_reduces_tokens(tool, capsys, tmp_path):
    out = tmp_path / "out.json"
    reduced = "test_vit+evit:keep=0.5,fuse_token=True"
    tool("model_bench")(
        ["test_vit", reduced, "--batch-size", "2", "--input-size", "96", "--mode", "forward", "--repeats", "1",
         "--warmup", "0", "--json", str(out)]
    )  # fmt: skip
    assert reduced in capsys.readouterr().out
    assert [row["model"] for row in json.loads(out.read_text())["results"]] == ["test_vit", reduced]


def test_kernel_bench(tool, capsys, tmp_path):
    out = tmp_path / "out.json"
    tool("kernel_bench")(
        ["na2d", "--cases", "7x7", "--batch-size", "1", "--repeats", "1", "--contestants", "dense", "portable",
         "--json", str(out)]
    )  # fmt: skip
    assert "7x7 h16 k7 d1" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [(r["contestant"], r["wrong"]) for r in document["results"]] == [("dense", False), ("portable", False)]
    assert document["settings"]["op"] == "na2d"


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("profile", ["resnet_50"], "unknown model 'resnet_50'"),
        ("model_bench", ["test_vit", "resnet_50"], "unknown model 'resnet_50'"),
        ("model_bench", ["test_vit+tomee:r=4"], "test_vit+tomee:r=4: method must be one of"),
        ("profile", ["test_resnet+tome:r=4"], "test_resnet+tome:r=4: model must be of one of the families"),
        ("kernel_bench", ["na2d", "--cases", "9000"], "no case of na2d"),
        ("kernel_bench", ["na2d", "--contestants", "abacus"], "unknown contestants abacus"),
    ],
)
def test_bad_arguments_end_with_a_clear_error(tool, capsys, name, argv, message):
    with pytest.raises(SystemExit) as error:
        tool(name)(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
