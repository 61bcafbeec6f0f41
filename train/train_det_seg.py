#!/usr/bin/env python
"""Train a detector or a segmentor from an mm config: `python train/train_det_seg.py CONFIG`.

    python train/train_det_seg.py configs/detection/nat/mask-rcnn_nat-tiny_fpn_ms-3x_coco.py
    torchrun --nproc-per-node 8 train/train_det_seg.py CONFIG --launcher pytorch
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config file, see configs/detection and configs/segmentation")
    parser.add_argument("--work-dir", type=Path, help="logs and checkpoints (default: outputs/NAME_OF_CONFIG)")
    parser.add_argument("--checkpoint", help="start the backbone from this classification checkpoint, a file or a URL")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the work dir")
    parser.add_argument("--launcher", default="none", choices=["none", "pytorch", "slurm", "mpi"])
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", default=[], help="dotted keys of the config")
    args = parser.parse_args(argv)

    try:
        from visionbb.mm.config import fit_to_machine, load_config, parse_options
    except ImportError as error:
        sys.exit(f"train_det_seg.py: {error}")
    from mmengine.runner import Runner

    try:
        config = load_config(args.config, parse_options(args.cfg_options))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.checkpoint:
        config.model.backbone.update(checkpoint=args.checkpoint, pretrained=False)
    config.work_dir = str(args.work_dir or Path("outputs") / args.config.stem)
    config.launcher = args.launcher
    config.resume = args.resume
    for note in fit_to_machine(config):
        print(note)
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main()
