"""What token reduction costs: every method on one trained ViT, as it is and after a short fine-tuning.

Methods are compared at equal multiply-adds, a share of the plain model's. Each finds the r or keep for it by
`target_gmacs`; AS-ViT learns its thresholds for it in the fine-tuning; ALGM takes what its own threshold gives. The
teacher of DynamicViT is the plain model.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..cards import markdown_table
from ..profiling import count_flops, interleaved
from ..profiling.timing import forward_call, stopwatch
from ..reduction import METHODS
from ..reduction.models import Reduced
from .config import ConfigError, TrainConfig
from .engine import evaluate, train
from .run import Run, prepare

COMPARED = sorted(METHODS.keys() - {"ia_red2"})  # which removes nothing before a training that is not here
TASKS_OF = {
    "as_vit": ("reduction_budget",),
    "dynamic_vit": ("reduction_distillation",),
    "mctf": ("classification", "reduction_consistency"),
}
# As strong for any model as AS-ViT's budget is for DeiT-S: the weight 2 of a loss in GMACs, 4.6 of them.
BUDGET_WEIGHT = 2 * 4.6


@dataclass(frozen=True)
class ReducedResult:
    """One method at one budget. Accuracies (%) and losses are of the evaluation split, GMACs of its mean image."""

    method: str  # a name in METHODS; "none" for the plain model
    share: float | None  # of the plain model's multiply-adds, asked for; None where nothing is asked
    task: str  # what the fine-tuning learnt
    gmacs: float
    top1: float
    loss: float
    tuned_gmacs: float
    tuned_top1: float
    tuned_loss: float
    images_per_sec: float  # inference, after fine-tuning


def compare_reductions(
    config: TrainConfig,
    methods: Sequence[str] = (),
    shares: Sequence[float] = (0.7, 0.5),
    *,
    batch_size: int = 64,
    repeats: int = 20,
    clock: str = "cpu",
    earlier: Sequence[ReducedResult] = (),
    console: Console | None = None,
) -> list[ReducedResult]:
    """Reduces, evaluates and fine-tunes the model of a run once for each method and share; the plain model comes first.

    What a model cannot be reduced by, or not that far, is told on the console and left out.

    Args:
        config: of the fine-tuning, which starts from its `initial_checkpoint`; its output folder gets one for each run.
            It must be without a moving average, which few steps hardly move.
        methods: names in `METHODS`; none for those in `COMPARED`.
        shares: of the plain model's multiply-adds, in (0, 1).
        batch_size: of the images that inference is timed with.
        repeats, clock: of the timing, where all models take turns; as in `profiling.compare_models`.
        earlier: results of the same plain model, from which those of all other methods are taken over, and the plain
            model's. To its images per second then, those of the new rows are scaled.

    Raises:
        ConfigError: as `prepare` does for the plain model; a moving average, an unknown method, a share out of range,
            another plain model than that of the earlier results.
    """
    console = console or Console()
    if config.model_ema:
        raise ConfigError("model_ema must be off where reductions are compared")
    if unknown := sorted(set(methods) - METHODS.keys()):
        raise ConfigError(f"methods must be among {', '.join(sorted(METHODS))}, got {unknown[0]!r}")
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ConfigError(f"shares must lie between 0 and 1, got {wrong[0]}")

    def run_of(name: str, **options: Any) -> Run:
        return prepare(replace(config, output=f"{config.output}/{name}", **options))

    rows: list[ReducedResult] = []
    models: dict[int, nn.Module] = {}

    def add(run: Run, method: str, share: float | None) -> None:
        console.print(f"{run.output.name} ...", highlight=False)
        gmacs, before = _gmacs(run), evaluate(run)
        after = train(run, Console(quiet=True))
        models[len(rows)] = run.eval_model
        rows.append(ReducedResult(
            method, share, run.config.task, gmacs, before["top1"], before["loss"], _gmacs(run), after["top1"],
            after["loss"], images_per_sec=0.0))

    plain = run_of("none")
    if earlier:
        then, now = earlier[0], evaluate(plain)
        if any(not math.isclose(now[name], getattr(then, name), rel_tol=1e-4) for name in ("top1", "loss")):
            raise ConfigError(f"initial_checkpoint must be that of the earlier results, of top1 {then.top1} and loss "
                              f"{then.loss}, got {now['top1']} and {now['loss']}")
        rows.append(then)
        models[0] = plain.eval_model
    else:
        add(plain, "none", None)
    images = next(iter(plain.val_loader))[0]
    for method in methods or COMPARED:
        for task in TASKS_OF.get(method, ("classification",)):
            budgeted = not METHODS[method].adaptive or task == "reduction_budget"
            for share in shares if budgeted else (None,):
                try:
                    run = run_of("_".join(map(str, filter(None, (method, share, task)))), task=task,
                                 **_options(config, method, task, share, rows[0].gmacs))
                except ConfigError as error:
                    console.print(f"left out: {method} at {share}: {error}", highlight=False)
                    continue
                add(run, method, share)

    batch = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size]
    calls = {key: forward_call(model, batch) for key, model in models.items()}
    times = interleaved(calls, repeats=repeats, stopwatch=stopwatch(plain.device, clock))
    speed = {key: batch_size / time.median for key, time in times.items()}
    scale = earlier[0].images_per_sec / speed[0] if earlier else 1.0
    rows = [replace(row, images_per_sec=scale * speed[key]) for key, row in enumerate(rows)]
    rows += [row for row in earlier[1:] if row.method not in {row.method for row in rows}]
    return rows[:1] + sorted(rows[1:], key=lambda row: row.method)


def _options(
    config: TrainConfig, method: str, task: str, share: float | None, plain_gmacs: float
) -> dict[str, Any]:
    """The options of a run that reduces to a share of the plain model's multiply-adds."""
    if task == "reduction_budget":
        return {"reduction": {"method": method}, "budget_gmacs": share * plain_gmacs,
                "budget_weight": BUDGET_WEIGHT / plain_gmacs}
    if share is None:
        return {"reduction": {"method": method}}
    teacher = {"kd_model_name": config.model, "kd_model_kwargs": config.model_kwargs,
               "kd_pretrained_path": config.initial_checkpoint} if task == "reduction_distillation" else {}
    return {"reduction": {"method": method, "target_gmacs": share * plain_gmacs}, **teacher}


@torch.no_grad()
def _gmacs(run: Run) -> float:
    """Of the mean image: where the image decides how many tokens it needs, they are run one by one."""
    model = run.eval_model.eval()
    images = torch.cat([images for images, _ in run.val_loader])
    if not isinstance(model, Reduced):
        return count_flops(model, tuple(images.shape[1:])).gmacs
    each = images if model.reduction.method.adaptive else images[:1]
    return sum(model.reduction.report(image[None]).gmacs for image in each) / len(each)


def reductions_block(
    rows: Sequence[ReducedResult], environment: Mapping[str, Any], added: Mapping[str, str] | None = None
) -> str:
    """The results as the table of a card.

    Args:
        rows: the plain model first.
        environment: what `profiling.output.environment` says of the machine.
        added: methods whose rows came later, and when.
    """
    plain = rows[0]
    names = {"reduction_consistency": ", consistency", "reduction_budget": ", budget",
             "reduction_distillation": ", distillation"}
    later = "".join(f" `{method}`: {date[:10]}, in turns with the plain model, to whose speed above it is scaled."
                    for method, date in (added or {}).items())
    table = markdown_table([
        {
            "method": row.method if row is plain else f"`{row.method}`{names.get(row.task, '')}",
            "asked": "" if row.share is None else f"{row.share:.0%}",
            "MMACs": f"{row.gmacs * 1e3:.2f}",
            "top-1 %": f"{row.top1:.2f}",
            "tuned: MMACs": f"{row.tuned_gmacs * 1e3:.2f}",
            "tuned: top-1 %": f"{row.tuned_top1:.2f}",
            "images/s": f"{row.images_per_sec:.0f}",
        }
        for row in rows
    ])
    return (
        f"{table}\n\nimages/s: processor time of inference on {environment['cpu']}, {environment['threads']} thread(s),"
        f" all in turns, torch {environment['torch']}, {environment['date'][:10]}.{later}"
    )


def pretrain(recipe: Mapping[str, Any], output: Path, console: Console | None = None) -> Path:
    """The last checkpoint in a folder; trained by a recipe first where there is none."""
    checkpoint = output / "last.pth.tar"
    if not checkpoint.is_file():
        train(prepare(TrainConfig(**{**recipe, "output": str(output)})), console)
    return checkpoint
