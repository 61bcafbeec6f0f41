"""An op's paths against each other and against its peers: checked against the reference, then timed in turns.

    python tools/kernel_bench.py na2d --cases 56x56 --threads 1 --json out.json
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse

import torch

from visionbb.profiling import bench_op
from visionbb.profiling.op_bench import results_table
from visionbb.profiling.ops import OPS
from visionbb.profiling.output import show, write_json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", default="na2d", choices=OPS)
    parser.add_argument("--cases", nargs="+", default=[""], help="take the cases whose name contains one of these")
    parser.add_argument("--contestants", nargs="+", help="take these, ratios against the first (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time (default: wall)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--json", type=Path, help="write results with the environment")
    args = parser.parse_args(argv)

    if args.threads:
        torch.set_num_threads(args.threads)
    op = OPS[args.op]
    cases = [case for case in op.cases if any(part in str(case) for part in args.cases)]
    if not cases:
        parser.error(f"no case of {args.op} contains any of {args.cases}; there are: {', '.join(map(str, op.cases))}")
    settings = {"batch_size": args.batch_size, "repeats": args.repeats, "clock": args.clock}
    results = []
    for case in cases:
        try:
            rows = bench_op(
                op, case, device=args.device, dtype=getattr(torch, args.dtype), contestants=args.contestants, **settings
            )
        except ValueError as error:
            parser.error(str(error))
        show(results_table(f"{args.op} {case}, batch {args.batch_size}, {args.dtype}, {args.device}", rows))
        results += rows
    if args.json:
        write_json(args.json, results, args.device, op=args.op, dtype=args.dtype, **settings)
    if any(row.wrong for row in results):
        sys.exit("a contestant's result differs from the reference: see its note")


if __name__ == "__main__":
    main()
