"""Speed of models against each other, in turns in one process: inference, training, and growth with the image.

    python tools/model_bench.py swin_tiny_patch4_window7_224 nat_tiny dinat_tiny --input-size 224 448 --mode both

A plain ViT against itself with fewer tokens, NAME+METHOD:key=value,... as `visionbb.reduction.reduce_tokens` takes it:

    python tools/model_bench.py deit_small_patch16_224 deit_small_patch16_224+tome:r=13 --threads 1 --mode forward
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse

import torch

from visionbb.kernels import BACKENDS
from visionbb.profiling import compare_models, growth
from visionbb.profiling.compare import MODES, comparison_table, growth_table
from visionbb.profiling.output import show, write_json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="+", help="timm model names, visionbb's included; NAME+METHOD:key=value,... reduces tokens"
    )
    parser.add_argument("--baseline", help="model that ratios are taken against (default: the first)")
    parser.add_argument("--mode", default="both", choices=[*MODES, "both"], help="train: forward and backward")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--input-size", type=int, nargs="+", default=[224], help="sides in pixels (default: 224)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="path of visionbb's ops (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time (default: wall)")
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    parser.add_argument("--json", type=Path, help="write results with the environment")
    args = parser.parse_args(argv)

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {
        "baseline": args.baseline or args.models[0],
        "modes": list(MODES) if args.mode == "both" else [args.mode],
        "batch_size": args.batch_size,
        "backend": args.backend,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "clock": args.clock,
    }
    try:
        rows = compare_models(
            args.models, args.input_size, device=args.device, dtype=getattr(torch, args.dtype), **settings
        )
    except ValueError as error:
        parser.error(str(error))
    show(comparison_table(rows, settings["baseline"]))
    if len(args.input_size) > 1:
        show(growth_table(growth(rows)))
    if args.json:
        write_json(args.json, rows, args.device, dtype=args.dtype, **settings)


if __name__ == "__main__":
    main()
