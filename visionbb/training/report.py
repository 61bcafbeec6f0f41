"""One figure that shows what a trained classifier does: sample images with predictions, and the confusion matrix."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .engine import predictions
from .run import Run

ROWS, COLUMNS = 8, 10
INK, MUTED, WRONG = "#333333", "#8a8a8a", "#d62728"


@dataclass
class _Sample:
    image: Tensor  # (C, H, W), pixels in 0..1
    predicted: int
    target: int


def write_report(run: Run) -> Path:
    """Draw the predictions on the evaluation split into `report.png` in the output folder, and return its path.

    On the left up to 80 images sorted by class: wrong predictions (in red, at most half of the places) and right ones
    of all classes. On the right the confusion matrix: a row a true class, a column a predicted one.
    """
    samples, confusion = _collect(run)
    total, right = int(confusion.sum()), int(confusion.trace())
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    figure.suptitle(f"{run.config.model} on {run.config.dataset}: {right} of {total} test images right "
                    f"({100 * right / total:.2f} %)", fontsize=14, color=INK, fontweight="bold")
    left, right_half = figure.subfigures(1, 2, width_ratios=(1.1, 1), wspace=0.04)
    left.suptitle("predictions (red: wrong, the truth in brackets)", fontsize=11, color=MUTED)
    grid = left.subplots(ROWS, COLUMNS).T.ravel()  # column by column: ten classes make about a column each
    for axes in grid:
        axes.axis("off")
    for axes, sample in zip(grid, samples, strict=False):
        _draw_sample(axes, sample, run.classes)
    _draw_confusion(right_half.subplots(), confusion, run.classes)
    path = run.output / "report.png"
    figure.savefig(path, dpi=140)
    return path


def _collect(run: Run) -> tuple[list[_Sample], np.ndarray]:
    """Predict the evaluation split; return the samples to show and the confusion matrix (truth, prediction)."""
    classes = run.config.num_classes
    mean, std = (torch.tensor(stat).view(-1, 1, 1) for stat in (run.config.mean, run.config.std))
    places = ROWS * COLUMNS
    confusion = np.zeros((classes, classes), dtype=np.int64)
    wrong: list[_Sample] = []
    right: dict[int, list[_Sample]] = defaultdict(list)
    for images, logits, targets in predictions(run):
        for image, predicted, target in zip(images.cpu(), logits.argmax(-1).tolist(), targets.tolist(), strict=True):
            confusion[target, predicted] += 1
            kept, limit = (right[target], places // classes + 1) if predicted == target else (wrong, places)
            if len(kept) < limit:
                kept.append(_Sample((image * std + mean).clamp(0, 1), predicted, target))
    of_all_classes = [sample for target in sorted(right) for sample in right[target]]
    shown = wrong[:max(places // 2, places - len(of_all_classes))]
    spread = np.linspace(0, len(of_all_classes) - 1, min(places - len(shown), len(of_all_classes))).round().astype(int)
    shown += [of_all_classes[index] for index in spread]
    return sorted(shown, key=lambda sample: sample.target), confusion


def _draw_sample(axes: Axes, sample: _Sample, classes: list[str]) -> None:
    grey = sample.image.shape[0] == 1
    axes.imshow(sample.image[0] if grey else sample.image.permute(1, 2, 0), cmap="gray_r", vmin=0, vmax=1)
    if sample.predicted == sample.target:
        axes.set_title(classes[sample.predicted], fontsize=9, color=INK, pad=2)
        return
    axes.set_title(f"{classes[sample.predicted]} ({classes[sample.target]})", fontsize=9, color=WRONG,
                   fontweight="bold", pad=2)
    axes.axis("on")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=WRONG, linewidth=2.5)


def _draw_confusion(axes: Axes, confusion: np.ndarray, classes: list[str]) -> None:
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title("confusion matrix (images)", fontsize=11, color=MUTED)
    axes.set_xlabel("prediction", color=INK)
    axes.set_ylabel("truth", color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    if len(classes) > 20:  # too many for names and numbers
        axes.set(xticks=[], yticks=[])
        return
    rotation = 0 if max(map(len, classes)) <= 3 else 90
    axes.set_xticks(range(len(classes)), classes, rotation=rotation)
    axes.set_yticks(range(len(classes)), classes)
    for (target, predicted), count in np.ndenumerate(confusion):
        if count:
            light = shares[target, predicted] > 0.5
            colour = WRONG if target != predicted else "white" if light else INK
            axes.text(predicted, target, str(count), ha="center", va="center", fontsize=10, color=colour,
                      fontweight="normal" if target == predicted else "bold")
