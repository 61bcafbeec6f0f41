"""The loop: one epoch of training, evaluation, and a whole run with its progress bar, log and checkpoints."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.task import evaluation_sample_limit
from timm.utils import dispatch_clip_grad, trim_summary, update_summary
from torch import Tensor

from .checkpoint import seed_epoch
from .run import Run


def train_one_epoch(run: Run, epoch: int, on_batch: Callable[[], None] = lambda: None) -> float:
    """Train for one epoch, counted from 0, and return its mean loss.

    Gradients of `grad_accum_steps` batches are averaged into one update (the last update of an epoch may have fewer).
    `on_batch` is called after each batch.
    """
    config, task, optimizer = run.config, run.task, run.optimizer
    loader, batches = run.train_loader, len(run.train_loader)
    seed_epoch(config.seed, epoch)
    if hasattr(loader.dataset, "set_epoch"):  # datasets that are streams shuffle themselves
        loader.dataset.set_epoch(epoch)
    loader.mixup_enabled = config.mixup_off_epoch is None or epoch < config.mixup_off_epoch

    task.get_trainable_module().train()
    optimizer.zero_grad()
    updates = epoch * run.updates_per_epoch
    loss_sum = torch.zeros((), device=run.device)
    for batch, (input, target) in enumerate(loader):
        group_start = batch - batch % config.grad_accum_steps
        group_size = min(config.grad_accum_steps, batches - group_start)
        with run.autocast():
            loss = task(input, target)["loss"]
        update = batch + 1 == group_start + group_size
        _backward(run, loss / group_size, update)
        if update:
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
            if run.scheduler is not None:
                run.scheduler.step_update(updates)
        loss_sum += loss.detach()
        on_batch()
    return (loss_sum / batches).item()


def _backward(run: Run, loss: Tensor, update: bool) -> None:
    """Add the gradients of `loss`, and at the end of a group clip them and take the step."""
    config = run.config
    parameters = list(run.task.get_clip_parameters(exclude_head=config.clip_mode == "agc"))
    if run.loss_scaler is not None:
        run.loss_scaler(loss, run.optimizer, clip_grad=config.clip_grad, clip_mode=config.clip_mode,
                        parameters=parameters, need_update=update)
        return
    loss.backward()
    if update:
        if config.clip_grad is not None:
            dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
        run.optimizer.step()


@torch.no_grad()
def predictions(run: Run) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images (B, C, H, W), logits (B, num_classes) and targets (B,) of the evaluation split, batch by batch."""
    model = run.eval_model.eval()
    for input, target in run.val_loader:
        with run.autocast():
            output = model(input)
        yield input, output, target


def evaluate(run: Run) -> dict[str, float]:
    """Return loss, top1 and top5 (per cent) on the evaluation split."""
    evaluator = run.task.create_evaluator(max_samples=evaluation_sample_limit(run.val_loader))
    for _, output, target in predictions(run):
        evaluator.update(output, target)
    return evaluator.compute()


def train(run: Run, console: Console | None = None) -> dict[str, float]:
    """Train from `run.start_epoch` to the end of the schedule (or `stop_epoch`), and return the last evaluation.

    After each epoch: a line on the console, a row in `summary.csv` (epochs counted from 0, as timm does), and the
    checkpoints `last` and, on a new best top1, `model_best`. Trained weights that a run starts from are evaluated
    first.

    Raises:
        FloatingPointError: the loss is no longer finite; the last checkpoint is of the epoch before.
    """
    console = console or Console()
    config, summary = run.config, run.output / "summary.csv"
    trim_summary(str(summary), run.start_epoch)
    last_epoch = min(run.epochs, config.stop_epoch or run.epochs)
    metrics: dict[str, float] = {}
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    if config.starts_trained and run.start_epoch == 0:
        metrics = evaluate(run)
        console.print(f"before training: test loss {metrics['loss']:.4f}  top1 {metrics['top1']:.2f}", highlight=False)
    with progress:
        bar = progress.add_task("", total=last_epoch * len(run.train_loader),
                                completed=run.start_epoch * len(run.train_loader))
        for epoch in range(run.start_epoch, last_epoch):
            progress.update(bar, description=f"epoch {epoch + 1}/{run.epochs}")
            lr = max(group["lr"] for group in run.optimizer.param_groups)
            start = time.perf_counter()
            loss = train_one_epoch(run, epoch, on_batch=lambda: progress.advance(bar))
            seconds = time.perf_counter() - start
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss became {loss} in epoch {epoch + 1}: lower lr or clip_grad")
            metrics = evaluate(run)
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, metrics["top1"])
            best, best_epoch = run.saver.save_checkpoint(epoch, metrics["top1"])
            rate = len(run.train_loader) * config.batch_size / seconds
            update_summary(epoch, {"loss": loss, "images_per_sec": rate}, metrics, filename=str(summary), lr=lr)
            console.print(
                f"epoch {epoch + 1:>{len(str(run.epochs))}}/{run.epochs}  loss {loss:.4f}  "
                f"test loss {metrics['loss']:.4f}  top1 {metrics['top1']:6.2f}  "
                f"(best {best:.2f} in {best_epoch + 1})  lr {lr:.2e}  {rate:.0f} img/s", highlight=False)
    return metrics or evaluate(run)
