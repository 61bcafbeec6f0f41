"""Training with fewer tokens: the option `reduction`, and the tasks that it brings."""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from rich.console import Console

from visionbb.reduction import reduce_tokens, remove_reduction
from visionbb.reduction.models import Reduced
from visionbb.training import (
    ConfigError,
    ReductionBudget,
    ReductionConsistency,
    ReductionDistillation,
    TrainConfig,
    parse_config,
    prepare,
    train,
)
from visionbb.training import run as run_module

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
DEIT = "deit_tiny_patch16_224"
SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}  # 16 patches of the digits' 16 x 16 pixels
CONSISTENT = {"task": "reduction_consistency"}


@pytest.fixture
def digits(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes the options of a short run on a fifth of the digits, with overrides."""
    def make(**overrides: Any) -> TrainConfig:
        options = {
            "model": DEIT, "model_kwargs": SMALL, "dataset": "visionbb/digits", "train_split": "test",
            "val_split": "test", "in_chans": 1, "img_size": 16, "mean": [0.305], "std": [0.376], "crop_pct": 1.0,
            "no_aug": True, "batch_size": 64, "workers": 0, "device": "cpu", "epochs": 2, "warmup_epochs": 0,
            "report": False, "reduction": {"method": "tome", "r": 2}, "output": str(tmp_path / "run")}
        return TrainConfig(**(options | overrides))
    return make


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- The option -----------------------------------------------------------------------------------------------------

def test_a_run_trains_the_reduced_model_and_saves_the_plain_ones_weights(digits, tmp_path: Path) -> None:
    run = prepare(digits(model_ema=True, reduction={"method": "evit", "keep": 0.5}))
    assert isinstance(run.eval_model.module, Reduced)  # the moving average
    assert run.task.trainable_module.reduction.schedule == (1.0, 0.5, 0.5, 0.5)
    train(run, QUIET)
    checkpoint = torch.load(run.output / "last.pth.tar", weights_only=True)
    plain = timm.create_model(DEIT, img_size=16, in_chans=1, num_classes=10, **SMALL)
    plain.load_state_dict(checkpoint["state_dict"])
    plain.load_state_dict(checkpoint["state_dict_ema"])
    assert checkpoint["args"]["reduction"] == {"method": "evit", "keep": 0.5}
    assert parse_config(["--config", str(run.output / "args.yaml")]).reduction == {"method": "evit", "keep": 0.5}

    reduced = prepare(digits(initial_checkpoint=str(run.output / "last.pth.tar"), output=str(tmp_path / "next")))
    assert same(state(reduced.eval_model), checkpoint["state_dict_ema"])  # which timm prefers
    images = next(iter(reduced.val_loader))[0]
    model = reduced.eval_model.eval()
    reduced_output = model(images)
    assert not torch.allclose(remove_reduction(model)(images), reduced_output, atol=1e-4)


def test_budgets_are_meant_for_the_images_of_the_run(digits) -> None:
    model = prepare(digits(reduction={"method": "tome", "target_gmacs": 0.0006})).eval_model
    report = model.reduction.report(torch.randn(1, 1, 16, 16))
    assert 0.0005 < report.gmacs <= 0.0006 < report.plain_gmacs


def test_the_command_line_has_it() -> None:
    config = parse_config(["--reduction", "method=evit", "keep=0.7", "fuse_token=True"])
    assert config.reduction == {"method": "evit", "keep": 0.7, "fuse_token": True}


@pytest.mark.parametrize("extra", [
    {"model_ema": True, "model_ema_decay": 0.9},
    CONSISTENT | {"amp": True, "mixup": 0.2},
    {"task": "reduction_budget", "budget_gmacs": 0.0006, "budget_weight": 1e4, "reduction": {"method": "as_vit"}},
    {"task": "reduction_distillation"},
], ids=["ema", "consistency-amp-mixup", "budget", "distillation"])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(digits, taught, tmp_path: Path, extra: dict) -> None:
    options = taught if extra.get("task") == "reduction_distillation" else digits
    whole = prepare(options(**extra, output=str(tmp_path / "whole")))
    metrics = train(whole, QUIET)
    train(prepare(options(**extra, stop_epoch=1)), QUIET)
    resumed = prepare(options(**extra, resume="auto"))
    assert resumed.start_epoch == 1
    assert train(resumed, QUIET) == metrics
    assert same(state(whole.eval_model), state(resumed.eval_model))
    assert same(state(whole.task.trainable_module), state(resumed.task.trainable_module))


def test_a_resumed_run_tells_of_another_reduction(digits) -> None:
    train(prepare(digits(stop_epoch=1)), QUIET)
    (_, note) = prepare(digits(resume="auto", reduction={"method": "tome", "r": 3})).notes
    assert "reduction: {'method': 'tome', 'r': 2} -> {'method': 'tome', 'r': 3}" in note


@pytest.mark.parametrize(("overrides", "message"), [
    ({"reduction": {"r": 2}}, "reduction must name a method, got {'r': 2}"),
    ({"reduction": "tome"}, "reduction must be of type dict, got 'tome'"),
    ({"reduction": {"method": "tomee", "r": 2}}, "reduction .* of model .*: method must be one of .*tome.*got 'tomee'"),
    ({"reduction": {"method": "tome"}}, "reduction .*exactly one of r, keep and target_gmacs"),
    ({"reduction": {"method": "tome", "r": 2, "colour": 1}}, "reduction .*tome has no option 'colour'"),
    ({"reduction": {"method": "tome", "r": [1, 2]}}, "reduction .*r as a list must have one entry"),
    ({"model": "test_efficientnet", "model_kwargs": {}}, "reduction .*'test_efficientnet'.*one of the families"),
    (CONSISTENT | {"reduction": {}}, "reduction must be set with task 'reduction_consistency'"),
    (CONSISTENT | {"reduction": {"method": "evit", "keep": 0.5}}, r"reduction must remove r tokens .*\[1.0, 0.5"),
    (CONSISTENT | {"reduction": {"method": "algm"}}, r"reduction must remove r tokens .*\[0, 0, 0, 0\]"),
    (CONSISTENT | {"reduction": {"method": "tome", "r": 0}}, "reduction must remove r tokens"),
    (CONSISTENT | {"grad_checkpointing": True}, "grad_checkpointing must be off with task 'reduction_consistency'"),
    ({"task": "reduction_budget"}, "budget_gmacs must be set with task 'reduction_budget' and no other, got None"),
    ({"budget_gmacs": 1.0}, "budget_gmacs must be set .* no other, got 1.0 with task 'classification'"),
    ({"task": "reduction_budget", "budget_gmacs": 1.0}, "must be by method 'as_vit' .*got 'tome'"),
    ({"consistency_max_r": 0}, "consistency_max_r must be at least 1"),
])
def test_reductions_that_cannot_be_are_named(digits, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message):
        prepare(digits(**overrides))


# ---- Consistency ----------------------------------------------------------------------------------------------------

@pytest.fixture
def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(DEIT, img_size=16, num_classes=5, **SMALL).train()


def consistency(model: torch.nn.Module, digits: Callable[..., TrainConfig], **overrides: Any) -> ReductionConsistency:
    return ReductionConsistency(model, digits(**CONSISTENT, smoothing=0.0, **overrides), CPU)


def test_loss_is_of_both_passes_and_of_the_class_tokens_of_sure_images(vit, digits) -> None:
    images, classes = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        vit.head.weight.mul_(150)  # some images are sure
    few, more = (reduce_tokens(copy.deepcopy(vit), "tome", r=r) for r in ([3, 0, 4, 2], [1, 0, 1, 1]))
    tokens = [model.forward_features(images)[:, 0] for model in (few, more)]
    logits = [vit.head(x) for x in tokens]
    sure = logits[0].softmax(-1)[torch.arange(6), classes] > 0.4
    assert 0 < sure.sum() < 6
    apart = (tokens[0] - tokens[1].detach()).square().mean(-1)[sure].mean()
    expected = sum(F.cross_entropy(x, classes) for x in logits) + 7 * apart

    task = consistency(reduce_tokens(vit, "tome", r=[3, 0, 4, 2]), digits, consistency_weight=7.0)
    assert task.max_r == 4
    loss = _draws(task, images, classes)[1]
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    wanted = few.blocks[0].mlp.fc1.weight.grad + more.blocks[0].mlp.fc1.weight.grad
    torch.testing.assert_close(vit.blocks[0].mlp.fc1.weight.grad, wanted)


def _draws(task: ReductionConsistency, images: torch.Tensor, classes: torch.Tensor) -> dict[int, torch.Tensor]:
    """The loss at each r' that many steps draw."""
    schedules, losses = [], {}
    embed = task.trainable_module.patch_embed
    hook = embed.register_forward_hook(lambda *_: schedules.append(task.trainable_module.reducer.schedule))
    for _ in range(40):
        loss = task(images, classes)["loss"]
        own, cut = schedules[-2:]
        assert own == task.trainable_module.reducer.schedule == task.schedule
        losses[max(cut)] = loss
        assert cut == tuple(min(entry, max(cut)) for entry in own)
    hook.remove()
    return losses


@pytest.mark.parametrize(("max_r", "drawn"), [(None, {0, 1, 2, 3}), (2, {0, 1}), (9, {0, 1, 2, 3})])
def test_smaller_r_is_drawn_below_the_bound(vit, digits, max_r: int | None, drawn: set[int]) -> None:
    task = consistency(reduce_tokens(vit, "mctf", r=4), digits, consistency_max_r=max_r)
    assert _draws(task, torch.randn(2, 3, 16, 16), torch.tensor([0, 1])).keys() == drawn


def test_images_that_are_not_sure_need_not_agree(vit, digits) -> None:
    images, classes = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        vit.head.weight.zero_()
        vit.head.bias.zero_()
    task = consistency(reduce_tokens(vit, "tome", r=2), digits)
    assert task(images, classes)["loss"].item() == pytest.approx(2 * torch.tensor(5.0).log().item())


def test_mixed_images_are_sure_of_their_classes_together(vit, digits) -> None:
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        vit.head.weight.zero_()
        vit.head.bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).mul(0.9))  # 0.31 each of two classes
    reduce_tokens(vit, "tome", r=4)
    agreement = []
    for mixed in ([0.96, 0.01, 0.01, 0.01, 0.01], [0.6, 0.37, 0.01, 0.01, 0.01]):
        losses = [consistency(vit, digits, mixup=0.2, consistency_weight=weight, consistency_max_r=1)(
            images, torch.tensor([mixed]))["loss"] for weight in (0.0, 1.0)]
        agreement.append((losses[1] - losses[0]).item())
    assert agreement[0] == 0
    assert agreement[1] > 1e-4


# ---- Budget ---------------------------------------------------------------------------------------------------------

def test_thresholds_move_towards_the_budget(vit, digits) -> None:
    images, classes = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
    reduce_tokens(vit, "as_vit")
    with torch.no_grad():
        vit.reducer.method.thresholds.fill_(1 / 17)  # amid the scores
    plain = vit.eval().reduction.report(images).plain_gmacs
    vit.train()
    for target, sign in ((0.0, -1), (plain, 1)):
        config = digits(task="reduction_budget", budget_gmacs=target, budget_weight=1e9,
                        reduction={"method": "as_vit"})
        vit.zero_grad()
        ReductionBudget(vit, config, CPU)(images, classes)["loss"].backward()
        gradient = vit.reducer.method.thresholds.grad
        assert (gradient * sign >= 0).all()
        assert gradient.any()


# ---- Distillation ---------------------------------------------------------------------------------------------------

TAUGHT = {"task": "reduction_distillation", "reduction": {"method": "dynamic_vit", "keep": 0.7},
          "kd_model_name": DEIT, "kd_model_kwargs": SMALL}


@pytest.fixture
def taught(digits, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes the options of a run on the digits with a teacher, that of the tests untrained."""
    teacher = timm.create_model(DEIT, img_size=16, in_chans=1, num_classes=10, **SMALL)
    path = tmp_path / "teacher.pth"
    torch.save(teacher.state_dict(), path)
    return lambda **overrides: digits(**TAUGHT | {"kd_pretrained_path": str(path)} | overrides)


def test_loss_has_its_four_terms(vit, taught) -> None:
    images, classes = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.manual_seed(1)
    teacher = timm.create_model(DEIT, img_size=16, num_classes=5, **SMALL).eval()
    reduce_tokens(vit, "dynamic_vit", keep=0.6)
    shares = (10 / 16, 6 / 16, 4 / 16)
    with torch.no_grad():
        wanted, theirs = teacher(images).softmax(-1), teacher.forward_features(images)[:, 1:]
        torch.manual_seed(2)
        x, state, _ = vit.forward_tokens(images)
        x = vit.norm(x)
        output = vit.head(x[:, 0])
        stays = state.record[-1] > 0.5
        assert 0 < stays.sum() < stays.numel()
        terms = {
            "": F.cross_entropy(output, classes),
            "ratio": sum((mask.mean(1) - share).square().mean() for mask, share in zip(state.record, shares)) / 3,
            "kl": (wanted * (wanted.log() - output.log_softmax(-1))).sum(-1).mean(),
            "tokens": (x[:, 1:] - theirs)[stays].square().mean(),
        }
    for ratio, distill in ((0.0, 0.0), (3.0, 0.0), (2.0, 0.5)):
        task = ReductionDistillation(vit, taught(smoothing=0.0, ratio_weight=ratio, distill_weight=distill), CPU,
                                     copy.deepcopy(teacher).train())
        torch.manual_seed(2)
        loss = task(images, classes)["loss"]
        expected = terms[""] + ratio * terms["ratio"] + distill * (terms["kl"] + terms["tokens"])
        torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, p in vit.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    assert not any(p.requires_grad for p in task.teacher.parameters())
    assert not task.train().teacher.training


def test_predictors_learn_on_the_digits(taught) -> None:
    """In a few steps the loss falls; afterwards evaluation keeps the numbers of the schedule."""
    run = prepare(taught(epochs=5, lr=3e-3))
    model = run.task.trainable_module
    before = state(model.reducer.method)
    train(run, QUIET)
    rows = (run.output / "summary.csv").read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("train_loss")]) for row in rows[1:]]
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(value, before[name]) for name, value in state(model.reducer.method).items())
    report = run.eval_model.eval().reduction.report(next(iter(run.val_loader))[0])
    assert report.tokens == ((16, 16), (12, 12), (9, 9), (7, 7))
    saved = torch.load(run.output / "last.pth.tar", weights_only=True)["state_dict"]
    assert saved.keys() == model.state_dict().keys()


@pytest.mark.parametrize(("overrides", "message"), [
    ({"kd_model_name": None}, "kd_model_name must name the teacher of task 'reduction_distillation'"),
    ({"reduction": {"method": "tome", "r": 2}}, "must be by method 'dynamic_vit' .*got {'method': 'tome'"),
    ({"reduction": {"method": "dynamic_vit", "keep": 1.0}}, "and remove tokens with task .*'keep': 1.0"),
    ({"kd_model_name": "test_efficientnet", "kd_model_kwargs": {}, "kd_pretrained_path": None},
     "kd_model_name 'test_efficientnet' must be a ViT: .*EfficientNet"),
    ({"kd_model_kwargs": SMALL | {"embed_dim": 48}}, r"width and its rows and .*\(32, 4, 4\), got \(48, 4, 4\)"),
    ({"kd_model_kwargs": SMALL | {"patch_size": 8}}, r"\(32, 4, 4\), got \(32, 2, 2\)"),
    ({"ratio_weight": -1.0}, "ratio_weight must be at least 0"),
])
def test_teachers_that_do_not_fit_are_named(taught, monkeypatch, overrides: dict, message: str) -> None:
    def untrained(config: TrainConfig, num_classes: int, in_chans: int) -> torch.nn.Module:
        return timm.create_model(config.kd_model_name, num_classes=num_classes, in_chans=in_chans,
                                 **{"img_size": 16} | config.kd_model_kwargs if config.kd_model_kwargs else {})

    monkeypatch.setattr(run_module, "create_teacher", untrained)
    with pytest.raises(ConfigError, match="(?s)" + message):
        prepare(taught(**overrides))
