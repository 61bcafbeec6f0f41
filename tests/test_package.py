"""The package: its import, its registration with timm, its three ways of installation."""
import importlib.metadata
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import timm
from timm.models import _registry

import visionbb
from visionbb.models._registry import refuse_to_shadow

ROOT = Path(__file__).parents[1]


def python(code, *, executable=sys.executable, **kwargs):
    run = subprocess.run([str(executable), "-c", code], capture_output=True, text=True, **kwargs)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_no_name_of_timm_is_taken():
    ours = {name for name, build in _registry._model_entrypoints.items() if build.__module__.startswith("visionbb.")}
    assert ours, "nothing is registered"
    theirs = set(python("import timm; print(*timm.list_models(), *timm.list_modules())").split())
    assert len(theirs) > 1000
    assert not theirs & ours
    assert not theirs & {path.stem for path in (ROOT / "visionbb" / "models").glob("[!_]*.py")}


def test_the_guard_refuses_a_name_of_timm():
    with pytest.raises(ValueError, match="'resnet18' belongs to timm"):
        refuse_to_shadow("resnet18")
    refuse_to_shadow("nat_tiny")  # ours: registering again on a reload is fine
    refuse_to_shadow("a_name_that_nobody_has")


def test_import_is_silent_and_light():
    code = "import warnings; warnings.simplefilter('error'); import timm, sys; before = set(sys.modules);"
    out = python(code + "import visionbb; print(*(set(sys.modules) - before))").split()
    heavy = {"triton", "matplotlib", "fvcore", "sklearn", "onnx", "mmcv", "mmengine", "pandas"}
    assert not heavy & {name.split(".")[0] for name in out}
    assert any(name.startswith("visionbb.kernels") for name in out)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, timm, visionbb;"
        "print(timm.create_model('nat_digits').eval()(torch.randn(1, 3, 32, 32)).shape[1])"
    )
    assert python(code) == "10"


def test_unknown_model_names_are_timms_error():
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("nat_enormous")


def test_checkout_holds_kernels_as_a_subpackage():
    link = ROOT / "visionbb" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert Path(visionbb.kernels.__file__).parent.resolve() == ROOT / "kernels"


def test_editable_install_is_this_checkout():
    """`make test` installs editable, so that the whole suite runs that way."""
    installed = importlib.metadata.distributions(name="visionbb")  # an egg-info folder in the checkout is one, too
    origins = [json.loads(text) for d in installed if (text := d.read_text("direct_url.json"))]
    assert [origin["dir_info"]["editable"] for origin in origins] == [True]
    assert Path(visionbb.__file__).resolve() == ROOT / "visionbb" / "__init__.py"


@pytest.mark.slow
def test_wheel_holds_the_kernels(tmp_path):
    """Builds sdist and wheel, installs the wheel into a new environment and uses it outside the checkout."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT], check=True, capture_output=True, text=True
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    executable = tmp_path / "env" / "bin" / "python"
    pip = [executable, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # The dependencies come from the environment of the tests, which stands last.
    (packages / "dependencies.pth").write_text(f"{Path(timm.__file__).parents[1]}\n")
    code = (
        "import visionbb, torch; from visionbb.kernels import na2d; print(visionbb.kernels.__file__);"
        "print(na2d(*torch.randn(3, 1, 5, 5, 2, 8), 3).shape[2])"
    )
    where, size = python(code, executable=executable, cwd=tmp_path).splitlines()
    assert Path(where).parent == packages / "visionbb" / "kernels"
    assert size == "5"
