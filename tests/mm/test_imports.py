"""What happens at import, in processes of their own: what is missing is said, what comes too late as well."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )


def test_without_the_extra():
    done = python("import sys; sys.modules['mmcv'] = None; import visionbb; print('fine'); import visionbb.mm")
    assert done.stdout == "fine\n"
    assert "ImportError: visionbb.mm needs mmcv, not installed" in done.stderr
    assert "pip install 'visionbb[mm]'" in done.stderr


@pytest.mark.slow
def test_scripts_without_the_extra():
    for script in ("train/train_det_seg.py any.py", "tools/test_det_seg.py any.py any.pth"):
        path, *args = script.split()
        done = python(
            f"import sys, runpy; sys.modules['mmcv'] = None; sys.argv = {[path, *args]!r};"
            f"runpy.run_path({path!r}, run_name='__main__')"
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "pip install 'visionbb[mm]'" in done.stderr


@pytest.mark.slow
def test_one_log_line_and_guards_replaced():
    """mmdet's structures imported first hold a roi_align that only raises; afterwards they hold a real one."""
    done = python(
        "import mmdet.structures.mask.structures as m; import visionbb.mm, torch;"
        "out = m.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0., 0, 0, 4, 4]]), (2, 2), 1.0, 0, 'avg', True);"
        "print(out.sum().item())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4.0"
    assert (done.stdout + done.stderr).count("come from torchvision") == 1


@pytest.mark.slow
def test_after_a_failed_import_of_mmdet():
    """Without ops mmdet.models fails half-way; visionbb.mm mends what was imported, and the second try succeeds."""
    done = python(
        "import contextlib\n"
        "with contextlib.suppress(ImportError):\n"
        "    import mmdet.models\n"
        "    print('mmcv has ops of its own')\n"
        "import visionbb.mm, mmdet.models\n"
        "from mmdet.models.dense_heads import rpn_head\n"
        "print(rpn_head.batched_nms.__module__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mmcv.ops.nms"


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["from mmseg.registry import MODELS", "import visionbb.mm; from mmdet.registry import MODELS"]
)
def test_no_custom_imports_needed(first):
    """mmengine finds the scope by itself, from mmseg's registry and from mmdet's, once that has its ops."""
    done = python(
        f"{first}; print(MODELS.build(dict(type='visionbb.TimmBackbone', model_name='nat_digits')).channels)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[32, 64, 128, 256]"
