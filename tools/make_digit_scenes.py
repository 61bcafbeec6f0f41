"""Write scenes of real handwritten digits in COCO's and ADE20K's formats, for the configs named digits_*.

    python tools/make_digit_scenes.py            # data/digit_scenes, 400 + 100 scenes, about 3 MB
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse

from visionbb.mm.digit_scenes import write_digit_scenes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/digit_scenes"), help="folder (default: %(default)s)")
    parser.add_argument("--training", type=int, default=400, help="scenes to train on (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=100, help="scenes to evaluate on (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a scene in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        write_digit_scenes(args.out, args.training, args.validation, args.size, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {args.out}: {args.training} training and {args.validation} validation scenes")


if __name__ == "__main__":
    main()
