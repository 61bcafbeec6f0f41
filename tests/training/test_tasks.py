"""Tasks: what a step minimises, what of the model it moves, and runs of them on the digits."""
from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from timm.models import VisionTransformer

from visionbb.models.drop_ins import DropIn, inherit_attention
from visionbb.training import TASKS, AttentionDistillation, ConfigError, Run, TrainConfig, prepare, train
from visionbb.training.config import load_recipe
from visionbb.training.tasks import attention_map, cross_entropy

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
CPU = torch.device("cpu")
SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DIGITS = {"dataset": "visionbb/digits", "val_split": "test", "in_chans": 1, "img_size": 16, "mean": [0.305],
          "std": [0.376], "crop_pct": 1.0, "no_aug": True, "batch_size": 64, "workers": 0, "device": "cpu",
          "warmup_epochs": 0, "report": False, "weight_decay": 0.0}
STUDENT = {"model": "deit_tiny_patch16_224_hedgehog", "model_kwargs": SMALL | {"img_size": 16}}
TEACHER = {"kd_model_name": "deit_tiny_patch16_224", "kd_model_kwargs": SMALL}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a small ViT that knows the digits fairly well."""
    output = tmp_path_factory.mktemp("teacher")
    run = prepare(TrainConfig(**DIGITS, model="deit_tiny_patch16_224", model_kwargs=SMALL, epochs=12, lr=4e-3,
                              smoothing=0.0, clip_grad=1.0, output=str(output)))
    assert train(run, QUIET)["top1"] > 70
    return output / "last.pth.tar"


@pytest.fixture
def distillation(teacher: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes the options of a short distillation from that teacher, with overrides."""
    def make(**overrides: Any) -> TrainConfig:
        options = {"task": "attention_distillation", **STUDENT, **TEACHER, "kd_pretrained_path": str(teacher),
                   "epochs": 2, "lr": 2e-2, "output": str(tmp_path / "distill")}
        return TrainConfig(**(DIGITS | options | overrides))
    return make


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def map_parameters(run: Run) -> set[str]:
    return {name for name in state(run.task.trainable_module) if ".feature_map." in name}


def test_options_name_the_tasks() -> None:
    (option,) = (field for field in dataclasses.fields(TrainConfig) if field.name == "task")
    assert option.metadata["choices"] == tuple(TASKS)


# ---- The loss -------------------------------------------------------------------------------------------------------

def pair(**kwargs: Any) -> tuple[VisionTransformer, DropIn]:
    """A teacher whose attention is far from uniform, and a drop-in for it."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, num_classes=5, **SMALL, **kwargs)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(16)
    return vit, DropIn(mixer="hedgehog", img_size=16, num_classes=5, **SMALL)


@torch.no_grad()
def timms_maps(vit: VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """The attention maps of all blocks, as timm's own unfused code computes them."""
    maps = []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(args[0]))
    vit(images)
    return maps


def options(**overrides: Any) -> TrainConfig:
    return TrainConfig(task="attention_distillation", **STUDENT, **TEACHER, **overrides)


def test_loss_is_the_cross_entropy_of_timms_own_maps_on_the_teachers_inputs() -> None:
    vit, student = pair()
    images = torch.randn(3, 3, 16, 16)
    task = AttentionDistillation(student, options(), CPU, vit)
    with torch.no_grad():  # the student's own stream must not matter
        student.norm.weight.zero_()
        for block in student.blocks:
            block.mlp.fc2.weight.normal_()
            block.mixer.feature_map.q_weight.normal_()
    loss = task(images, torch.zeros(3))["loss"]

    inputs = []
    for block in vit.blocks:
        block.norm1.register_forward_hook(lambda _, args, out: inputs.append(out))
    maps = timms_maps(vit, images)
    expected = [-(wanted * block.mixer.attention_map(x, 4, 4).log()).sum(-1).mean()
                for block, wanted, x in zip(student.blocks, maps, inputs)]
    torch.testing.assert_close(loss, sum(expected) / 2)
    for block, wanted, x in zip(vit.blocks, maps, inputs):
        assert wanted.shape == (3, 2, 17, 17)
        assert wanted.max() > 0.5  # uniform ones would not show which is which
        torch.testing.assert_close(attention_map(block.attn, x, 4, 4), wanted)


def test_normalised_queries_and_keys_are_part_of_the_map() -> None:
    vit, _ = pair(qk_norm=True)
    attention, inputs = vit.blocks[0].attn, []
    with torch.no_grad():
        attention.q_norm.weight.normal_()
    attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected, _ = timms_maps(vit, torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(attention_map(attention, inputs[0], 4, 4), expected)


def test_own_softmax_attention_teaches_as_timms_does() -> None:
    vit, student = pair()
    ours = DropIn(mixer="softmax", img_size=16, num_classes=5, **SMALL)
    inherit_attention(ours, vit)
    images, losses = torch.randn(2, 3, 16, 16), []
    for teacher in (vit, ours):
        losses.append(AttentionDistillation(student, options(), CPU, teacher)(images, torch.zeros(2))["loss"])
    torch.testing.assert_close(*losses)


def test_cross_entropy_is_least_where_the_maps_agree() -> None:
    wanted = torch.randn(2, 3, 5, 5).softmax(-1)
    entropy = -(wanted * wanted.log()).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(wanted, wanted), entropy)
    assert cross_entropy(torch.randn(2, 3, 5, 5).softmax(-1), wanted) > entropy
    assert cross_entropy(torch.zeros(2, 3, 5, 5), wanted).isfinite()


@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
@pytest.mark.parametrize("mixer", ["hedgehog", "focused"])
def test_learned_maps_of_any_kind_get_gradients_at_any_size(mixer: str, size: tuple[int, int]) -> None:
    vit, _ = pair(dynamic_img_size=True)
    student = DropIn(mixer=mixer, img_size=16, num_classes=5, **SMALL)
    task = AttentionDistillation(student, options(), CPU, vit)
    task(torch.randn(2, 3, *size), torch.zeros(2))["loss"].backward()
    for name, parameter in student.named_parameters():
        if ".feature_map." in name:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_mixed_precision_leaves_the_maps_exact() -> None:
    vit, student = pair()
    task = AttentionDistillation(student, options(), CPU, vit)
    images = torch.randn(2, 3, 16, 16)
    exact = task(images, torch.zeros(2))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(images, torch.zeros(2))["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


def test_teacher_stays_in_evaluation_mode() -> None:
    vit, student = pair()
    AttentionDistillation(student, options(), CPU, vit).train()
    assert student.training
    assert not any(module.training for module in vit.modules())


# ---- Runs on the digits ---------------------------------------------------------------------------------------------

def test_feature_maps_learn_and_nothing_else_moves(distillation, teacher: Path) -> None:
    run = prepare(distillation())
    batch = next(iter(run.val_loader))
    student, before, teacher_before = run.task.trainable_module, state(run.eval_model), state(run.task.teacher)
    weights = torch.load(teacher, weights_only=True)["state_dict"]
    assert teacher_before.keys() == weights.keys()
    assert not moved(teacher_before, weights)
    assert all(torch.equal(before[name.replace(".attn.", ".mixer.")], weights[name])
               for name in weights if name.startswith("blocks."))

    loss_before, text = run.task(*batch)["loss"].item(), io.StringIO()
    after = train(run, Console(file=text, width=200))
    loss_after, maps = run.task(*batch)["loss"].item(), timms_maps(run.task.teacher, batch[0])
    floor = torch.stack([cross_entropy(m, m) for m in maps]).mean().item()
    assert loss_after - floor < 0.5 * (loss_before - floor)
    first, *_ = text.getvalue().splitlines()
    assert first.startswith("before training: test loss")
    assert after["top1"] > float(first.split("top1")[1])

    assert moved(before, state(student)) == map_parameters(run)
    assert len(map_parameters(run)) == 2 * SMALL["depth"]
    assert not moved(teacher_before, state(run.task.teacher))
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in student.named_parameters() if ".feature_map." in name}


@pytest.mark.parametrize("extra", [{}, {"model_ema": True, "model_ema_decay": 0.9, "amp": True, "mixup": 0.2}],
                         ids=["plain", "ema-amp-mixup"])
def test_stopped_and_resumed_distillation_equals_the_uninterrupted_one(distillation, tmp_path: Path, extra) -> None:
    extra = extra | {"train_split": "test"}  # a fifth of the images
    whole = prepare(distillation(**extra, output=str(tmp_path / "whole")))
    metrics = train(whole, QUIET)
    train(prepare(distillation(**extra, stop_epoch=1)), QUIET)
    text = io.StringIO()
    resumed = prepare(distillation(**extra, resume="auto"))
    assert resumed.start_epoch == 1
    assert train(resumed, Console(file=text)) == metrics
    assert "before training" not in text.getvalue()
    assert not moved(state(whole.eval_model), state(resumed.eval_model))
    assert not moved(state(whole.task.trainable_module), state(resumed.task.trainable_module))


def test_second_stage_trains_everything_from_the_first(distillation, tmp_path: Path) -> None:
    first = prepare(distillation(epochs=1, train_split="test"))
    metrics = train(first, QUIET)
    text = io.StringIO()
    second = prepare(TrainConfig(**DIGITS | STUDENT | {
        "train_split": "test", "initial_checkpoint": str(first.output / "last.pth.tar"), "epochs": 1, "lr": 1e-3,
        "output": str(tmp_path / "tune")}))
    before = state(second.task.trainable_module)
    assert not moved(before, state(first.task.trainable_module))
    train(second, Console(file=text, width=200))
    assert f"before training: test loss {metrics['loss']:.4f}  top1 {metrics['top1']:.2f}" in text.getvalue()
    assert moved(before, state(second.task.trainable_module)) == before.keys()


def test_images_are_normalised_as_the_teachers_by_default(distillation) -> None:
    unset = {"mean": None, "std": None}
    for name, mean in (("vit_tiny_patch16_224", [0.5]), ("deit_tiny_patch16_224", [pytest.approx(0.449, abs=1e-3)])):
        assert prepare(distillation(**unset, kd_model_name=name)).config.mean == mean


@pytest.mark.parametrize(("overrides", "message"), [
    ({"kd_model_name": None}, "kd_model_name must name the teacher of task 'attention_distillation'"),
    ({"initial_checkpoint": "x.pth"}, "initial_checkpoint must be unset with task 'attention_distillation'.*'x.pth'"),
    ({"pretrained": True}, "pretrained must be unset with task 'attention_distillation'"),
    ({"task": "classification"}, "kd_model_name must be unset with task 'classification', which has no teacher"),
    ({"task": "distillation"}, "task must be one of classification, attention_distillation"),
    ({"kd_model_name": "deit_tinny_patch16_224"}, r"teacher \(kd_model_name.*unknown.*did you mean 'deit_tiny_patch16"),
    ({"kd_model_name": "deit_tiny_patch16_224.no_tag"}, "teacher .*tag"),
    ({"kd_model_kwargs": {"colour": 1}}, "teacher .*colour"),
    ({"kd_model_kwargs": SMALL | {"embed_dim": 48}}, "teacher .*cannot take .*last.pth.tar: .*size mismatch"),
    ({"kd_pretrained_path": "no/such.pth"}, "kd_pretrained_path: there is no file no/such.pth"),
    ({"model": "deit_tiny_patch16_224_elu"}, "'deit_tiny_patch16_224_elu' has no linear attention with a learned"),
    ({"model": "deit_tiny_patch16_224_polar"}, "'deit_tiny_patch16_224_polar' has no linear attention with a learned"),
    ({"model": "deit_tiny_patch16_224", "model_kwargs": SMALL}, "cannot inherit .*must be a drop-in"),
    ({"model_kwargs": SMALL | {"depth": 3}}, r"cannot inherit from kd_model_name .*model_kwargs.*depth"),
    ({"model_kwargs": SMALL | {"num_heads": 4}}, "cannot inherit .*num_heads"),
    ({"model_kwargs": SMALL | {"patch_size": 8}}, "cannot inherit .*patch_size"),
])
def test_distillations_that_cannot_be_are_named(distillation, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message):
        prepare(distillation(**overrides))


def test_teacher_without_softmax_attention_is_refused(distillation, tmp_path: Path) -> None:
    path = tmp_path / "elu.pth"
    torch.save(DropIn(mixer="elu", img_size=16, in_chans=1, num_classes=10, **SMALL).state_dict(), path)
    with pytest.raises(ConfigError, match="kd_model_name 'deit_tiny_patch16_224_elu' must have softmax attention"):
        prepare(distillation(kd_model_name="deit_tiny_patch16_224_elu", kd_pretrained_path=str(path),
                             kd_model_kwargs=SMALL | {"img_size": 16}))


@pytest.mark.slow
def test_recipes_convert_a_vit_and_keep_its_accuracy(tmp_path: Path) -> None:
    """The three commands of the README, on a smaller network and for fewer epochs."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = {"img_size": 16, "model_kwargs": SMALL | {"img_size": 16}, "report": False, "device": "cpu", "no_aug": True,
             "warmup_epochs": 0}
    top1 = {}
    for name, extra in (
        ("vit_digits", {"epochs": 15, "lr": 4e-3, "model_kwargs": SMALL}),
        ("hedgehog_digits_distill", {"epochs": 4, "kd_model_kwargs": SMALL}),
        ("hedgehog_digits_finetune", {"epochs": 4, "lr": 1e-3}),
    ):
        recipe = load_recipe(ROOT / "configs" / "train" / f"{name}.yaml") | small | extra
        for key in ("output", "kd_pretrained_path", "initial_checkpoint"):
            if key in recipe:
                recipe[key] = recipe[key].replace("outputs", str(tmp_path))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        script.main(["--config", str(path)])
        rows = (tmp_path / name / "summary.csv").read_text().splitlines()
        top1[name] = float(rows[-1].split(",")[rows[0].split(",").index("eval_top1")])
    assert top1["vit_digits"] > 90
    assert top1["hedgehog_digits_finetune"] >= 0.98 * top1["vit_digits"]
