"""Rewrites the tables of the model cards: published from the front matter, measured from params, GMACs and speed.

    python tools/update_cards.py                                          # params and GMACs of every card
    python tools/update_cards.py model_cards/nat.md --speed --device cuda --dtype bfloat16 --batch-size 256
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse

import torch

from visionbb.cards import (
    card_paths,
    measure,
    measure_speed,
    measured_block,
    published_block,
    read_card,
    replace_block,
)

CARDS = Path(__file__).resolve().parents[1] / "model_cards"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cards", nargs="*", type=Path, help="card files (default: all of model_cards)")
    parser.add_argument("--speed", action="store_true", help="also measure images/s, with the options below")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds (default: 10)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    args = parser.parse_args(argv)

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {"device": args.device, "dtype": getattr(torch, args.dtype), "batch_size": args.batch_size}
    for path in args.cards or card_paths(CARDS):
        try:
            card = read_card(path)
            names = list(card.tags())
            speeds = measure_speed(names, repeats=args.repeats, **settings) if args.speed else {}
            rows = [measure(name, speeds.get(name)) for name in names]
            text = replace_block(path.read_text(encoding="utf-8"), "published", published_block(card))
            text = replace_block(text, "measured", measured_block(rows, settings if args.speed else None))
        except ValueError as error:
            parser.error(str(error))
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
