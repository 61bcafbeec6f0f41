from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from timm.utils import NativeScaler

from visionbb.training import ConfigError, Run, engine, evaluate, prepare, train, train_one_epoch
from visionbb.training.checkpoint import resume
from visionbb.training.run import resolve_device

QUIET = Console(quiet=True)
# Every source of randomness: sampler, augmentation, erasing, mixing, dropout, stochastic depth.
RANDOM = {"aa": "rand-m5", "reprob": 0.5, "affine_degrees": 10, "drop": 0.2, "drop_path": 0.2}


def weights(run: Run) -> dict[str, torch.Tensor]:
    state = run.task.get_checkpoint_state() | run.task.get_checkpoint_state(ema=True)
    return {f"{key}.{name}": value for key in ("state_dict", "state_dict_ema") if key in state
            for name, value in state[key].items()}


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), f"{name} differs"


def rows(run: Run) -> list[dict[str, str]]:
    with open(run.output / "summary.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "train_images_per_sec"} for row in csv.DictReader(file)]


RUNS = {
    "plain": {},
    "random": RANDOM | {"opt": "sgd", "clip_grad": 1.0},
    "ema-amp-mixup": RANDOM | {"model_ema": True, "model_ema_decay": 0.9, "model_ema_warmup": True, "amp": True,
                               "mixup": 0.4, "cutmix": 0.4, "mixup_off_epoch": 3, "grad_accum_steps": 4},
    "epoch-schedule": {"sched": "step", "sched_on_updates": False, "decay_epochs": 1},
    "workers": RANDOM | {"workers": 2},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny_config, tmp_path, options) -> None:
    whole = prepare(tiny_config(**options, output=str(tmp_path / "whole")))
    metrics = train(whole, QUIET)

    stopped = prepare(tiny_config(**options, stop_epoch=2))
    train(stopped, QUIET)
    torch.rand(7)  # whatever else the process drew in between
    resumed = prepare(tiny_config(**options, resume="auto"))
    assert resumed.start_epoch == 2
    assert len(resumed.notes) == 1
    assert resumed.saver.best_metric == stopped.saver.best_metric is not None
    assert train(resumed, QUIET) == metrics
    assert_same_bits(weights(resumed), weights(whole))
    assert rows(resumed) == rows(whole)
    files = [torch.load(run.output / "last.pth.tar", weights_only=True) for run in (resumed, whole)]
    states = [{f"{i}.{k}": torch.as_tensor(v) for i, values in file["optimizer"]["state"].items()
               for k, v in values.items() if v is not None} for file in files]
    assert_same_bits(*states)
    assert files[0]["optimizer"]["param_groups"] == files[1]["optimizer"]["param_groups"]
    assert files[0]["saver"]["best_metric"] == files[1]["saver"]["best_metric"]


def test_run_that_breaks_within_an_epoch_resumes_exactly(tiny_config, tmp_path, monkeypatch) -> None:
    whole = prepare(tiny_config(**RANDOM, output=str(tmp_path / "whole")))
    train(whole, QUIET)

    batches = []

    def crash() -> None:
        batches.append(None)
        if len(batches) == 15:  # six batches an epoch: in the middle of the third
            raise KeyboardInterrupt

    original = engine.train_one_epoch
    monkeypatch.setattr(engine, "train_one_epoch", lambda run, epoch, on_batch: original(run, epoch, crash))
    with pytest.raises(KeyboardInterrupt):
        train(prepare(tiny_config(**RANDOM)), QUIET)
    monkeypatch.undo()
    resumed = prepare(tiny_config(**RANDOM, resume="auto"))
    assert resumed.start_epoch == 2
    train(resumed, QUIET)
    assert_same_bits(weights(resumed), weights(whole))


def test_seeds_decide_the_run(tiny_config, tmp_path) -> None:
    runs = [prepare(tiny_config(seed=seed, epochs=1, warmup_epochs=0, output=str(tmp_path / name)))
            for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    for run in runs:
        train(run, QUIET)
    assert_same_bits(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(*(weights(run)["state_dict.classifier.weight"] for run in (runs[0], runs[2])))


def test_loss_scale_is_part_of_the_checkpoint(tiny_config) -> None:
    run = prepare(tiny_config(stop_epoch=1))
    run.loss_scaler = run.saver.amp_scaler = NativeScaler("cpu")
    train(run, QUIET)
    expected = run.loss_scaler.state_dict()
    assert expected["_growth_tracker"] == 6
    again = prepare(tiny_config())
    scaler = NativeScaler("cpu")
    resume(run.output / "last.pth.tar", again.task, again.optimizer, scaler)
    assert scaler.state_dict() == expected


@pytest.mark.parametrize(("steps", "clip_grad"), [(2, None), (4, 0.5)])
def test_accumulated_gradients_equal_a_big_batch(tiny_config, steps: int, clip_grad: float | None) -> None:
    # A model without batch statistics, and an optimizer that does not divide by small gradients.
    options = {"model": "test_vit", "opt": "sgd", "lr": 0.1, "warmup_epochs": 0, "clip_grad": clip_grad}
    small, big = (prepare(tiny_config(**options, batch_size=8 // n, grad_accum_steps=n)) for n in (steps, 1))
    assert small.updates_per_epoch == big.updates_per_epoch == 3
    losses = [train_one_epoch(run, 0) for run in (small, big)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    moved = prepare(tiny_config(**options))
    for name, weight in weights(big).items():
        torch.testing.assert_close(weights(small)[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    assert any(not torch.equal(weights(moved)[name], weight) for name, weight in weights(big).items())


def test_last_group_of_an_epoch_is_averaged_over_its_own_size(tiny_config, monkeypatch) -> None:
    run = prepare(tiny_config(grad_accum_steps=4))  # six batches: groups of 4 and 2
    calls = []
    original = engine._backward

    def spy(run: Run, loss: torch.Tensor, update: bool) -> None:
        calls.append((loss.item(), update))
        original(run, loss, update)

    monkeypatch.setattr(engine, "_backward", spy)
    mean = train_one_epoch(run, 0)
    assert [update for _, update in calls] == [False, False, False, True, False, True]
    first, second = (sum(loss for loss, _ in group) for group in (calls[:4], calls[4:]))
    assert 4 * first + 2 * second == pytest.approx(6 * mean)


@pytest.mark.parametrize("options", [{}, {"amp": True, "model_ema": True, "model_ema_decay": 0.8, "loss": "bce"}],
                         ids=["plain", "amp-ema-bce"])
def test_loss_falls_and_colours_are_learnt(tiny_config, options) -> None:
    run = prepare(tiny_config(**options, model="test_vit", epochs=8, smoothing=0.0, color_jitter=None))
    metrics = train(run, QUIET)
    losses = [float(row["train_loss"]) for row in rows(run)]
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["top1"] == 100.0


def test_learning_rate_is_logged_along_the_schedule(tiny_config) -> None:
    run = prepare(tiny_config(lr=0.01, warmup_lr=0.001, warmup_epochs=1, min_lr=0.002, cooldown_epochs=2))
    train(run, QUIET)
    rates = [float(row["lr"]) for row in rows(run)]
    assert len(rates) == 6
    assert rates[0] == pytest.approx(0.001)
    assert rates[1] > rates[2] > rates[3]
    assert rates[4:] == pytest.approx([0.002, 0.002])


def test_moving_average_is_what_is_evaluated(tiny_config) -> None:
    run = prepare(tiny_config(model_ema=True, model_ema_decay=1.0, lr=0.1))
    before = evaluate(run)
    train_one_epoch(run, 0)
    # timm copies the weights at the first update and averages from the second on: with decay 1 it then stays there.
    after = evaluate(run)
    train_one_epoch(run, 1)
    assert evaluate(run) == after
    assert after != before


def test_finished_run_is_only_evaluated(tiny_config) -> None:
    metrics = train(prepare(tiny_config(epochs=2)), QUIET)
    again = prepare(tiny_config(epochs=2, resume="auto"))
    before = (again.output / "last.pth.tar").read_bytes()
    assert train(again, QUIET) == metrics
    assert (again.output / "last.pth.tar").read_bytes() == before
    assert len(rows(again)) == 2


def test_fresh_run_starts_a_new_log(tiny_config) -> None:
    for _ in range(2):
        run = prepare(tiny_config(epochs=1, warmup_epochs=0))
        train(run, QUIET)
    assert [row["epoch"] for row in rows(run)] == ["0"]


def test_infinite_loss_stops_the_run_before_it_is_saved(tiny_config) -> None:
    run = prepare(tiny_config())
    with torch.no_grad():
        run.task.get_trainable_module().classifier.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="training loss became nan in epoch 1"):
        train(run, QUIET)
    assert not (run.output / "last.pth.tar").exists()


def test_checkpoint_opens_without_code_and_in_timm(tiny_config) -> None:
    import timm
    run = prepare(tiny_config(epochs=1, warmup_epochs=0))
    train(run, QUIET)
    path = run.output / "model_best.pth.tar"
    state = torch.load(path, weights_only=True)
    assert state["arch"] == "test_efficientnet"
    assert state["args"]["img_size"] == 32
    model = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=path)
    assert_same_bits(model.state_dict(), state["state_dict"])


def test_changed_options_are_noted_on_resume(tiny_config) -> None:
    train(prepare(tiny_config(stop_epoch=1)), QUIET)
    run = prepare(tiny_config(resume="auto", lr=0.5))
    assert run.notes[1:] == ["changed since then: lr: 0.001 -> 0.5"]


@pytest.mark.parametrize("on_updates", [True, False])
def test_changed_schedule_holds_from_the_first_resumed_epoch(tiny_config, on_updates: bool) -> None:
    train(prepare(tiny_config(sched_on_updates=on_updates, lr=0.01, stop_epoch=2)), QUIET)
    run = prepare(tiny_config(sched_on_updates=on_updates, lr=0.002, sched="constant", resume="auto"))
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.002}


def test_resume_auto_without_a_checkpoint_starts_afresh(tiny_config) -> None:
    assert prepare(tiny_config(resume="auto")).start_epoch == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "test_vit"}, "is of the model 'test_efficientnet', not 'test_vit'"),
    ({"num_classes": 5}, r"classifier.bias is \(3,\) there and \(5,\) here"),
    ({"weight_decay": 0.3}, "keeps its optimizer, but weight_decay: 0.05 -> 0.3"),
    ({"resume": "no/such.pth.tar"}, "there is no checkpoint no/such.pth.tar"),
])
def test_checkpoint_that_does_not_fit_is_refused(tiny_config, options: dict, message: str) -> None:
    run = prepare(tiny_config(epochs=1, warmup_epochs=0))
    train(run, QUIET)
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_config(**({"resume": str(run.output / "last.pth.tar")} | options)))


@pytest.mark.parametrize("kind", ["text", "weights"])
def test_file_that_is_no_training_checkpoint_is_refused(tiny_config, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.pth"
    if kind == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="is not a checkpoint" if kind == "text" else "use initial_checkpoint"):
        prepare(tiny_config(resume=str(path)))


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "test_efficentnet"}, "unknown to timm and visionbb: did you mean 'test_efficientnet'"),
    ({"model": "test_vit.no_tag"}, "model 'test_vit.no_tag': .*tag"),
    ({"initial_checkpoint": "no/such.pth"}, "there is no file no/such.pth"),
    ({"opt": "adamv"}, "opt 'adamv' is unknown to timm: did you mean"),
    ({"device": "gpu"}, "device 'gpu' cannot be used here"),
    ({"amp": True, "amp_dtype": "float16"}, "float16 needs a CUDA device"),
    ({"num_classes": 2}, "num_classes is 2, but the dataset has 3 classes"),
    ({"model_kwargs": {"colour": 1}}, "model_kwargs {'colour': 1}: .*colour"),
])
def test_options_that_cannot_be_are_named(tiny_config, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_config(**options))


def test_device_names() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps", "xpu")
