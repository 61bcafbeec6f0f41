#!/usr/bin/env python
"""Train an image classifier: `python train/train.py --config configs/train/nat_digits.yaml`.

The option `task` says what is learnt: classes, or the attention maps of a teacher that becomes the model.

Every option has a default, may stand in the YAML recipe, and may be overridden on the command line (`--help` lists
them). The output folder receives args.yaml (the resolved options, itself a recipe), summary.csv (a row an epoch), the
checkpoints last.pth.tar and model_best.pth.tar, and, for the digits or with `--report`, report.png.
`--resume auto` continues a stopped run exactly where its last finished epoch left it.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

import visionbb  # noqa: F401  (registers the models)
from visionbb.training import ConfigError, parse_config, prepare, train, write_report


def main(argv: Sequence[str] | None = None) -> None:
    console = Console(soft_wrap=True, highlight=False)
    try:
        run = prepare(parse_config(argv))
    except (ConfigError, ModuleNotFoundError) as error:
        sys.exit(f"train.py: {error}")

    config = run.config
    parameters = sum(parameter.numel() for parameter in run.task.get_trainable_module().parameters())
    console.print(f"{config.model} ({parameters / 1e6:.2f} M parameters) on {config.dataset}: "
                  f"{len(run.train_loader.dataset)} training and {len(run.val_loader.dataset)} test images, "
                  f"{len(run.classes)} classes, device {run.device}")
    for note in run.notes:
        console.print(note)
    try:
        metrics = train(run, console)
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume auto continues after the last finished epoch")
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")

    weights = "moving average of the weights" if run.task.has_ema() else "last weights"
    console.print(f"test accuracy of the {weights}: {metrics['top1']:.2f} %")
    written = [run.output / name for name in ("summary.csv", "args.yaml", "last.pth.tar", "model_best.pth.tar")]
    if config.report:
        written.insert(0, write_report(run))
    for path in written:
        console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
