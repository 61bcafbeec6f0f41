"""Evaluate a trained detector or segmentor on the test set of its mm config.

    python tools/test_det_seg.py CONFIG outputs/NAME_OF_CONFIG/epoch_12.pth
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config file")
    parser.add_argument("checkpoint", type=Path, help="checkpoint of the training run")
    parser.add_argument("--work-dir", type=Path, help="logs (default: the checkpoint's folder)")
    parser.add_argument("--launcher", default="none", choices=["none", "pytorch", "slurm", "mpi"])
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", default=[], help="dotted keys of the config")
    args = parser.parse_args(argv)

    try:
        from visionbb.mm.config import load_config, parse_options
    except ImportError as error:
        sys.exit(f"test_det_seg.py: {error}")
    from mmengine.runner import Runner

    try:
        config = load_config(args.config, parse_options(args.cfg_options))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if not args.checkpoint.is_file():
        parser.error(f"no checkpoint {str(args.checkpoint)!r}")
    config.work_dir = str(args.work_dir or args.checkpoint.parent)
    config.launcher = args.launcher
    runner = Runner.from_cfg(config)
    runner.load_checkpoint(str(args.checkpoint), map_location="cpu", strict=True)
    return runner.test()


if __name__ == "__main__":
    main()
