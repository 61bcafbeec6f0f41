import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from visionbb.reduction import ReductionReport, merged_patches

TOOL = Path(__file__).parents[2] / "tools" / "visualize_tokens.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("visualize_tokens", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_colours_are_the_means_of_tokens():
    image = torch.rand(3, 8, 8)
    source, size = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[2, 1]])
    picture = merged_patches(image, ReductionReport((), 1.0, 1.0, source, size, (2, 2)))
    torch.testing.assert_close(picture[:, :4, 0], image[:, :4].mean((1, 2))[:, None].expand(-1, 4))
    torch.testing.assert_close(picture[:, 5, 1], image[:, 4:, :4].mean((1, 2)))
    assert (picture[:, 5:, 5:] == 0).all()


def test_draws_a_picture(tool, tmp_path, capsys):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    tool.main(["vit_tiny_patch16_224", str(tmp_path / "red.png"), "--r", "16", "--out", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size[0] > 500
    assert "GMACs an image" in capsys.readouterr().out


def test_wrong_arguments_are_told(tool, tmp_path, capsys):
    Image.new("RGB", (300, 200)).save(tmp_path / "black.png")
    for args, message in [
        (["vit_tiny_patch16_224", "nowhere.png"], "no image 'nowhere.png'"),
        (["vit_tiny_patch16_224", str(tmp_path / "black.png")], "exactly one of r, keep"),
        (["resnet18", str(tmp_path / "black.png"), "--r", "4"], "got ResNet"),
    ]:
        with pytest.raises(SystemExit):
            tool.main(args)
        assert message in capsys.readouterr().err
