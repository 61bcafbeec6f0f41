"""Accuracy, multiply-adds and speed of every token reduction on a small ViT of handwritten digits.

    python tools/reduction_table.py          # about ten minutes on one CPU core; trains the ViT where it is missing
    python tools/reduction_table.py --methods evit --add          # its rows anew, those of the others as they are

Each method runs at the same shares of the plain model's multiply-adds, as it is and after a short fine-tuning. Writes
the results as JSON and the measured table of the card.
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse
import json

from rich.console import Console

import visionbb  # noqa: F401  (registers the models)
from visionbb.cards import replace_block
from visionbb.profiling.output import environment, write_json
from visionbb.reduction import METHODS
from visionbb.training import ConfigError, TrainConfig
from visionbb.training.config import load_recipe
from visionbb.training.reductions import ReducedResult, compare_reductions, pretrain, reductions_block

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/train/vit_digits.yaml", help="of the plain ViT")
    parser.add_argument("--trained", type=Path, help="its output folder (default: the recipe's)")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=[], help="default: all but ia_red2")
    parser.add_argument("--add", action="store_true", help="to the results in --json, instead of these methods' there")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5], help="of its GMACs (default: 0.7 0.5)")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning (default: 3)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of fine-tuning (default: 5e-4)")
    parser.add_argument("--repeats", type=int, default=20, help="measured rounds of the timing (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("outputs/reductions"), help="folder of the fine-tuned")
    parser.add_argument("--json", type=Path, default=ROOT / "tools/results/reductions_digits_cpu.json")
    parser.add_argument("--card", type=Path, default=ROOT / "model_cards/token_reduction.md")
    args = parser.parse_args(argv)
    if args.add and not (args.methods and args.json.is_file()):
        parser.error(f"--add needs --methods, and results in {args.json}")

    console = Console(soft_wrap=True)
    try:
        recipe = load_recipe(args.recipe) | {"device": "cpu", "report": False}
        checkpoint = pretrain(recipe, args.trained or Path(recipe["output"]), console)
        tuning = {"epochs": args.epochs, "lr": args.lr, "warmup_epochs": 0}
        config = TrainConfig(**recipe | tuning | {"initial_checkpoint": str(checkpoint), "output": str(args.output)})
        before = json.loads(args.json.read_text()) if args.add else {"environment": environment(), "results": []}
        earlier = [ReducedResult(**row) for row in before["results"]]
        rows = compare_reductions(
            config, args.methods, args.shares, repeats=args.repeats, earlier=earlier, console=console
        )
    except (ConfigError, ModuleNotFoundError) as error:
        parser.error(str(error))
    settings = {"recipe": args.recipe.name, "clock": "cpu", **tuning}
    if args.add:
        date = environment()["date"]
        settings["added"] = before["settings"].get("added", {}) | dict.fromkeys(args.methods, date)
    write_json(args.json, rows, measured_in=before["environment"], **settings)
    block = reductions_block(rows, before["environment"], settings.get("added"))
    args.card.write_text(replace_block(args.card.read_text(encoding="utf-8"), "measured", block), encoding="utf-8")
    console.print(block, markup=False, highlight=False)


if __name__ == "__main__":
    main()
