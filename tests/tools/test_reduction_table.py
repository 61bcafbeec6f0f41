import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

from visionbb.cards import read_block, read_table
from visionbb.training.config import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("reduction_table", ROOT / "tools" / "reduction_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def settings(tmp_path):
    """Command line of a table on a tiny ViT of 16 patches, on a fifth of the digits."""
    tiny = {"img_size": 16, "model_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
            "epochs": 1, "warmup_epochs": 0, "no_aug": True, "train_split": "test"}
    recipe, card = tmp_path / "tiny.yaml", tmp_path / "card.md"
    recipe.write_text(yaml.safe_dump(load_recipe(ROOT / "configs" / "train" / "vit_digits.yaml") | tiny))
    card.write_text("# A page\n<!-- measured:begin -->\n<!-- measured:end -->\nthe rest\n")
    paths = {"recipe": recipe, "trained": tmp_path / "vit", "output": tmp_path / "tuned", "json": tmp_path / "out.json",
             "card": card}
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


@pytest.mark.slow
def test_trains_reduces_tunes_and_tells(main, settings, tmp_path, capsys):
    quick = ["--methods", "algm", "as_vit", "evit", "mctf", "tome", "--shares", "0.75", "0.3"]
    main([*settings, *quick, "--epochs", "1", "--repeats", "1"])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    plain = results[0]
    assert plain["method"] == "none"
    done = [(row["method"], row["share"], row["task"]) for row in results[1:]]
    assert done == [
        ("algm", None, "classification"), ("as_vit", 0.75, "reduction_budget"), ("as_vit", 0.3, "reduction_budget"),
        ("evit", 0.75, "classification"), ("mctf", 0.75, "classification"), ("mctf", 0.75, "reduction_consistency"),
        ("tome", 0.75, "classification"),
    ]
    assert "left out: mctf at 0.3" in capsys.readouterr().out
    for row in results[3:]:
        assert row["images_per_sec"] > 0
        if row["method"] != "as_vit":  # which has not learnt its thresholds yet
            assert 0.6 * plain["gmacs"] < row["gmacs"] <= 0.75 * plain["gmacs"] * (1 + 1e-5)
    text = (tmp_path / "card.md").read_text()
    assert text.endswith("the rest\n")
    table = read_table(read_block(text, "measured"))
    assert [row["method"] for row in table[4:]] == ["`evit`", "`mctf`", "`mctf`, consistency", "`tome`"]

    checkpoint = tmp_path / "vit" / "last.pth.tar"  # is trained once
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    before = checkpoint.stat().st_mtime_ns
    main([*settings, "--methods", "dynamic_vit", "tome", "--shares", "0.5", "--epochs", "1", "--repeats", "1", "--add"])
    assert checkpoint.stat().st_mtime_ns == before
    document = json.loads((tmp_path / "out.json").read_text())
    added = document["results"]
    assert added[:4] == results[:4]  # the plain model, algm, as_vit
    assert [(row["method"], row["share"], row["task"]) for row in added[4:]] == [
        ("dynamic_vit", 0.5, "reduction_distillation"), ("evit", 0.75, "classification"),
        ("mctf", 0.75, "classification"), ("mctf", 0.75, "reduction_consistency"), ("tome", 0.5, "classification"),
    ]
    assert document["settings"]["added"].keys() == {"dynamic_vit", "tome"}
    assert "`tome`: 20" in (tmp_path / "card.md").read_text()
    document["results"][0]["loss"] += 0.1  # of another plain model
    (tmp_path / "out.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        main([*settings, "--methods", "tome", "--add"])
    assert "initial_checkpoint must be that of the earlier results" in capsys.readouterr().err
    tuned = tmp_path / "tuned" / "tome_0.5_classification" / "last.pth.tar"
    assert torch.load(tuned, weights_only=True)["state_dict"].keys() == weights.keys()


def test_wrong_arguments_are_told(main, settings, tmp_path, capsys):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "last.pth.tar").touch()
    wrong = [(["--methods", "tomee"], "invalid choice"), (["--shares", "1.5"], "shares must lie"),
             (["--methods", "tome", "--add"], "--add needs --methods, and results in"),
             (["--add"], "--add needs --methods")]
    for args, message in wrong:
        with pytest.raises(SystemExit):
            main([*settings, *args])
        assert message in capsys.readouterr().err
