"""Compiles every Triton kernel ahead of time, without a GPU, and prints what became of it.

    python tools/kernel_report.py [--target sm_90] [--dtype bf16] [--model nat_tiny] [--json report.json]

Ends with status 1 if a kernel fails to compile or spills registers.
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse
import json

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from visionbb.kernels import _aot


def table(rows: list[_aot.Row]) -> Table:
    table = Table(title="Triton kernels, compiled ahead of time", box=box.SIMPLE)
    for name in ("kernel", "dtype", "shapes", "work", "target", "registers", "spills", "shared", "matrix instructions"):
        table.add_column(name, justify="right" if name in ("registers", "spills", "shared") else "left")
    for i, (kernel, target, cases, build) in enumerate(rows):
        work = [case.work for case in cases]
        binary = (
            kernel.removesuffix("_kernel"), cases[0].dtype, ", ".join(case.shape for case in cases),
            f"{min(work):.2f}" if len(cases) == 1 else f"{min(work):.2f} - {max(work):.2f}",
        )
        table.add_row(
            *(("",) * 4 if i and rows[i - 1].cases is cases else binary), target,
            *(map(str, build[:3]) if build.error is None else "---"),
            "failed" if build.error else ", ".join(f"{n} {kind}" for kind, n in build.matrix.items()) or "none",
            style=None if build.sound else "red",
        )
    return table


def as_json(rows: list[_aot.Row]) -> list[dict]:
    return [
        {
            "op": row.cases[0].op, "kernel": row.kernel, "dtype": row.cases[0].dtype, "target": row.target,
            **row.build._asdict(),
            "shapes": [{"shape": c.shape, "work": round(c.work, 3), "models": c.models} for c in row.cases],
        }
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=_aot.TARGETS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=_aot.TYPES.values())
    parser.add_argument("--model", help="only the shapes of this model")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(arguments)

    cases = [
        case for case in _aot.cases()
        if args.dtype in (None, case.dtype) and (args.model is None or args.model in case.models)
    ]
    if not cases:
        parser.error(f"no kernel serves --model {args.model} in --dtype {args.dtype or 'any'}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = list(track(_aot.report(cases, args.target or _aot.TARGETS), "compiling", console=Console(stderr=True)))
    console.print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    unsound = [row for row in rows if not row.build.sound]
    for row in unsound:
        if row.build.error:
            console.print(f"{row.kernel}, {row.target}, {row.cases[0].shape}: {row.build.error}", markup=False)
    console.print(f"{len(rows)} binaries, {len(unsound)} that fail or spill")
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
