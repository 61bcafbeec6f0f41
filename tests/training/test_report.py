from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from visionbb.training import evaluate, prepare, train, write_report
from visionbb.training.report import COLUMNS, ROWS, _collect


@pytest.mark.parametrize("options", [{}, {"dataset": "visionbb/digits", "in_chans": 1, "batch_size": 64}],
                         ids=["pictures", "digits"])
def test_report_is_a_legible_picture_of_the_evaluation(tiny_config, options) -> None:
    run = prepare(tiny_config(**options, epochs=1, warmup_epochs=0))
    train(run, Console(quiet=True))
    samples, confusion = _collect(run)
    assert confusion.sum() == len(run.val_loader.dataset)
    assert 100 * confusion.trace() / confusion.sum() == pytest.approx(evaluate(run)["top1"])
    assert len(samples) == min(ROWS * COLUMNS, len(run.val_loader.dataset))
    assert [sample.target for sample in samples] == sorted(sample.target for sample in samples)

    path = write_report(run)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] >= 800
    assert pixels.shape[1] >= 1600
    left = pixels[:, :pixels.shape[1] // 2, :3]  # the sample images
    assert (left.min(-1) < 0.95).mean() > 0.1 * len(samples) / (ROWS * COLUMNS)
    red = np.abs(left - np.array([0xd6, 0x27, 0x28]) / 255).max(-1) < 0.02
    wrong = any(sample.predicted != sample.target for sample in samples)
    assert red.any() == wrong
