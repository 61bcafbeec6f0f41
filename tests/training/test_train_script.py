from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "train" / "train.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_run_on_a_folder_with_a_recipe(script, picture_folder, tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "model": "test_efficientnet", "img_size": 32, "data_dir": str(picture_folder), "batch_size": 4, "workers": 0,
        "epochs": 9, "warmup_epochs": 0, "device": "cpu"}))
    output = tmp_path / "run"
    script.main(["--config", str(recipe), "--epochs", "2", "--output", str(output), "--report"])
    text = capsys.readouterr().out
    assert "24 training and 9 test images, 3 classes" in text
    assert "epoch 2/2" in text
    assert "test accuracy of the last weights:" in text
    for name in ("report.png", "summary.csv", "args.yaml", "last.pth.tar", "model_best.pth.tar"):
        assert f"wrote {output / name}" in text
        assert (output / name).stat().st_size > 0
    resolved = yaml.safe_load((output / "args.yaml").read_text())
    assert (resolved["epochs"], resolved["num_classes"], resolved["report"]) == (2, 3, True)

    script.main(["--config", str(output / "args.yaml"), "--epochs", "3", "--resume", "auto", "--no-report"])
    text = capsys.readouterr().out
    assert "after 2 epochs" in text
    assert "changed since then: epochs: 2 -> 3" in text
    assert "report.png" not in text


@pytest.mark.parametrize(("argv", "message"), [
    (["--model", "nat_tinny", "--dataset", "visionbb/digits"], "train.py: model 'nat_tinny' is unknown"),
    (["--model", "test_vit"], "train.py: data_dir must be given"),
    (["--lr-rate", "1"], "train.py: unknown argument '--lr-rate'"),
])
def test_mistakes_end_in_one_line(script, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        script.main(argv)


def test_script_is_thin() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 120
