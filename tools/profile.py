"""What models cost: parameters, GMACs, images/s, latency, peak memory; any timm name, visionbb's included.

    python tools/profile.py nat_tiny dinat_tiny swin_tiny_patch4_window7_224 --batch-size 8 --csv out.csv --plot out.png

With fewer tokens in a ViT, as `visionbb.reduction.reduce_tokens` takes it:

    python tools/profile.py deit_small_patch16_224 deit_small_patch16_224+tome:r=13

Of whole detectors and segmentors, given as mm configs, parameters and GMACs by part:

    python tools/profile.py configs/detection/nat/mask-rcnn_nat-tiny_fpn_ms-3x_coco.py --input 1280x800
"""
from __future__ import annotations

import sys
from pathlib import Path

# This file would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse
import re

import torch

from visionbb.kernels import BACKENDS
from visionbb.profiling import profile_models
from visionbb.profiling.output import show, write_csv, write_json
from visionbb.profiling.plot import AXES, plot_models
from visionbb.profiling.report import profile_table


def show_detectors(configs: list[str], size: str) -> None:
    """The table of mm configs; they need the extra `mm`, which nothing else here does."""
    from visionbb.mm.flops import flops_table

    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
        raise ValueError(f"--input must be WIDTHxHEIGHT in pixels, such as 1280x800, got {size!r}")
    width, height = map(int, size.split("x"))
    show(flops_table(configs, (height, width)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="+",
        help="timm model names, NAME+METHOD:key=value,... reduces tokens; or mm config files (*.py)",
    )  # fmt: skip
    parser.add_argument("--input", default="1280x800", metavar="WxH", help="image of mm configs (default: 1280x800)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--input-size", type=int, help="side in pixels (default: each model's own)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="path of visionbb's ops (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time (default: wall)")
    parser.add_argument("--train", action="store_true", help="also measure training steps")
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds; latency gets three times as many")
    parser.add_argument("--quick", action="store_true", help="three rounds and a short warm-up")
    parser.add_argument("--csv", type=Path, help="write a table in timm's columns")
    parser.add_argument("--json", type=Path, help="write results with the environment")
    parser.add_argument("--plot", type=Path, help="write a picture (png, svg, pdf)")
    parser.add_argument("--x", default="infer_gmacs", choices=AXES, metavar="COLUMN", help="of the plot")
    parser.add_argument("--y", default="infer_samples_per_sec", choices=AXES, metavar="COLUMN", help="of the plot")
    args = parser.parse_args(argv)

    if any(name.endswith(".py") for name in args.models):
        try:
            show_detectors(args.models, args.input)
        except (ImportError, FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    repeats = 3 if args.quick else args.repeats
    settings = {
        "input_size": args.input_size,
        "batch_size": args.batch_size,
        "train": args.train,
        "repeats": repeats,
        "latency_repeats": 3 * repeats,
        "warmup": 1 if args.quick else 3,
        "clock": args.clock,
    }
    try:
        profiles = profile_models(
            args.models, device=args.device, dtype=getattr(torch, args.dtype), backend=args.backend, **settings
        )
    except ValueError as error:
        parser.error(str(error))
    show(profile_table(profiles))
    if args.csv:
        write_csv(args.csv, profiles)
    if args.json:
        write_json(args.json, profiles, args.device, **settings)
    if args.plot:
        plot_models(profiles, args.plot, args.x, args.y)


if __name__ == "__main__":
    main()
