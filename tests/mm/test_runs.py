"""Whole runs by the scripts, on a few scenes: train, evaluate, resume, test, draw."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "det": (ROOT / "configs/detection/digits_mask-rcnn_nat-digits_fpn.py", "coco/bbox_mAP_50"),
    "seg": (ROOT / "configs/segmentation/digits_ravlt-digits_upernet.py", "mIoU"),
}


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def options(kind: str, scenes: Path, iterations: int) -> list[str]:
    """20 steps of two images with an evaluation at the end."""
    common = [f"{part}_dataloader.dataset.data_root={scenes}" for part in ("train", "val", "test")]
    common += ["train_dataloader.batch_size=2", "default_hooks.logger.interval=5", "log_level=WARNING"]
    common += ["param_scheduler.0.end=2"]  # hardly a warm-up, so that few steps show
    if kind == "seg":
        common += ["model.backbone.checkpoint=None"]  # of another run
        return [*common, f"train_cfg.max_iters={iterations}", f"train_cfg.val_interval={iterations}",
                "default_hooks.checkpoint.interval=10"]  # fmt: skip
    file = f"{scenes}/annotations/instances_validation.json"
    return [*common, f"train_cfg.max_epochs={iterations // 12 + 1}", "train_cfg.val_interval=1",
            f"val_evaluator.ann_file={file}", f"test_evaluator.ann_file={file}"]  # fmt: skip


def scalars(folder: Path) -> list[dict]:
    """What the run logged: training lines with a loss, evaluations with a metric."""
    return [json.loads(line) for file in sorted(folder.glob("*/vis_data/scalars.json")) for line in file.open()]


@pytest.fixture(scope="module", params=["det", "seg"])
def trained(request, scenes, tmp_path_factory) -> tuple[str, Path, Path]:
    """Kind, folder and checkpoint of a run of 24 (two epochs of 12 steps) or 20 steps."""
    folder = tmp_path_factory.mktemp(request.param)
    config, _ = CONFIGS[request.param]
    script("train/train_det_seg.py")(
        [str(config), "--work-dir", str(folder), "--cfg-options", *options(request.param, scenes, 20)]
    )
    return request.param, folder, Path((folder / "last_checkpoint").read_text())


@pytest.mark.slow
def test_trains_and_evaluates(trained):
    kind, folder, checkpoint = trained
    lines = scalars(folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    metric = CONFIGS[kind][1]
    assert any(metric in line for line in lines)
    assert checkpoint.is_file()


@pytest.mark.slow
def test_resumes(trained, scenes, tmp_path):
    """A run stopped and resumed goes on with the next step, optimizer state and all."""
    kind, folder, checkpoint = trained
    config, _ = CONFIGS[kind]
    (tmp_path / "last_checkpoint").write_text(str(checkpoint))
    script("train/train_det_seg.py")(
        [str(config), "--work-dir", str(tmp_path), "--resume", "--cfg-options", *options(kind, scenes, 30)]
    )
    done, before = (
        torch.load(Path((f / "last_checkpoint").read_text()), weights_only=False) for f in (tmp_path, folder)
    )
    assert before["meta"]["iter"] < done["meta"]["iter"]
    steps = [next(iter(state["optimizer"]["state"].values()))["step"] for state in (before, done)]
    assert steps[1] == done["meta"]["iter"]
    assert steps[0] == before["meta"]["iter"]


@pytest.mark.slow
def test_test_script(trained, scenes):
    kind, _, checkpoint = trained
    config, metric = CONFIGS[kind]
    results = script("tools/test_det_seg.py")(
        [str(config), str(checkpoint), "--cfg-options", *options(kind, scenes, 20)]
    )
    assert 0 <= results[metric] <= 100


@pytest.mark.slow
def test_infer_script(trained, scenes, tmp_path):
    """A picture of the image's size that is not the image."""
    kind, _, checkpoint = trained
    if kind == "det":  # what so few steps have taught is sure of nothing: now every proposal is a 0
        state = torch.load(checkpoint, weights_only=False)
        state["state_dict"]["roi_head.bbox_head.fc_cls.bias"][0] += 10
        checkpoint = tmp_path / "sure.pth"
        torch.save(state, checkpoint)
    image = scenes / "images/validation/00000.jpg"
    script("tools/infer_det_seg.py")([
        str(image), "--config", str(CONFIGS[kind][0]), "--checkpoint", str(checkpoint), "--out", str(tmp_path),
        "--score-threshold", "0",
    ])  # fmt: skip
    drawn = Image.open(tmp_path / "00000.png")
    assert drawn.size == Image.open(image).size
    assert drawn.convert("RGB").tobytes() != Image.open(image).tobytes()


@pytest.mark.slow
def test_contact_sheet(trained, scenes, tmp_path):
    """Two images above what was found on them, three times as large."""
    kind, _, checkpoint = trained
    images = [scenes / "images/validation" / f"0000{i}.jpg" for i in range(2)]
    script("tools/infer_det_seg.py")([
        *map(str, images), "--config", str(CONFIGS[kind][0]), "--checkpoint", str(checkpoint), "--out", str(tmp_path),
        "--score-threshold", "0", "--scale", "3", "--sheet", str(tmp_path / "sheet.png"),
    ])  # fmt: skip
    sheet = Image.open(tmp_path / "sheet.png")
    for i, image in enumerate(images):
        result = Image.open(tmp_path / f"{image.stem}.png").convert("RGB")
        assert result.size == (384, 384)
        left = i * (384 + 4)
        above, below = (sheet.crop((left, top, left + 384, top + 384)) for top in (0, 384 + 4))
        assert below.tobytes() == result.tobytes()
        assert above.tobytes() == Image.open(image).resize((384, 384), Image.Resampling.BICUBIC).tobytes()


@pytest.mark.slow
def test_checkpoint_of_another_config(trained, scenes, tmp_path, capsys):
    kind, _, checkpoint = trained
    other = next(config for name, (config, _) in CONFIGS.items() if name != kind)
    with pytest.raises(SystemExit):
        script("tools/infer_det_seg.py")(
            [str(scenes / "images/validation/00000.jpg"), "--config", str(other), "--checkpoint", str(checkpoint)]
        )
    assert "does not fit the config's model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("train/train_det_seg.py", ["nowhere.py"], "no config 'nowhere.py'"),
        ("train/train_det_seg.py", [str(CONFIGS["det"][0]), "--cfg-options", "epochs"], "options are KEY=VALUE"),
        ("tools/test_det_seg.py", [str(CONFIGS["det"][0]), "nowhere.pth"], "no checkpoint 'nowhere.pth'"),
        (
            "tools/infer_det_seg.py",
            ["nowhere.jpg", "--config", str(CONFIGS["det"][0]), "--checkpoint", "nowhere.pth"],
            "no image 'nowhere.jpg'",
        ),
        (
            "tools/infer_det_seg.py",
            ["nowhere.jpg", "--config", "c.py", "--checkpoint", "c.pth", "--scale", "0"],
            "--scale must be at least 1, got 0",
        ),
        ("tools/profile.py", [str(CONFIGS["det"][0]), "--input", "800"], "--input must be WIDTHxHEIGHT"),
        ("tools/profile.py", ["nowhere.py"], "no config 'nowhere.py'"),
        ("tools/make_digit_scenes.py", ["--training", "0"], "at least 1 scene"),
    ],
)
def test_wrong_calls(path, args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(path)(args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
