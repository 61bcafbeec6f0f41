"""Draw what a trained detector or segmentor finds: boxes and masks, or the segmentation, on the image.

    python tools/infer_det_seg.py IMAGE --config CONFIG --checkpoint outputs/NAME_OF_CONFIG/epoch_12.pth
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument("--config", type=Path, required=True, help="config file")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of the training run")
    parser.add_argument("--out", type=Path, default=Path("outputs/inference"), help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="of the boxes drawn (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=1, help="enlarge pictures of small images (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="also write one picture of all images, each above its result")
    args = parser.parse_args(argv)

    try:
        from visionbb.mm.config import load_config
        from visionbb.mm.inference import contact_sheet, draw, load_model, predict
    except ImportError as error:
        sys.exit(f"infer_det_seg.py: {error}")

    if args.scale < 1:
        parser.error(f"--scale must be at least 1, got {args.scale}")
    if missing := [str(image) for image in args.images if not image.is_file()]:
        parser.error(f"no image {missing[0]!r}")
    try:
        model = load_model(load_config(args.config), args.checkpoint, args.device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    pictures = [args.out / f"{image.stem}.png" for image in args.images]
    for image, picture in zip(args.images, pictures, strict=True):
        draw(model, image, predict(model, image), picture, args.score_threshold, args.scale)
        print(f"wrote {picture}")
    if args.sheet:
        contact_sheet(args.images, pictures, args.sheet)
        print(f"wrote {args.sheet}")


if __name__ == "__main__":
    main()
