from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "visualize_attention.py"


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("tools_visualize_attention", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_draws_the_photograph_and_a_panel_a_scan(main, tmp_path, capsys):
    out = tmp_path / "out.png"
    main(["vim_tiny", "--modules", "blocks.0", "--out", str(out)])
    assert "wrote" in capsys.readouterr().out
    width, height = Image.open(out).size
    assert 2 < width / height < 3.1  # three panels
    black = tmp_path / "black.png"
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(black)
    main(["mambavision_tiny", "--modules", "stages.3.blocks.0", "--image", str(black), "--out", str(out)])
    assert 1.5 < np.divide(*Image.open(out).size) < 2.1


@pytest.mark.parametrize(("argv", "message"), [
    (["vim_huge"], "Unknown model (vim_huge)"),
    (["vim_tiny", "--modules", "layers.0"], "modules must be names of modules of the model, got 'layers.0'"),
    (["vim_tiny", "--image", "nowhere.png"], "nowhere.png"),
])
def test_bad_arguments_end_with_a_clear_error(main, capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
