"""Draw which patches of an image a reduced ViT merges into one token, and which it drops.

    python tools/visualize_tokens.py deit_small_patch16_224 IMAGE --method tome --r 13 --pretrained
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from visionbb.reduction import METHODS, merged_patches, reduce_tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's name in timm, or of this package")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--method", choices=sorted(METHODS), default="tome", help="default: %(default)s")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--r", type=int, help="tokens that each block removes")
    amount.add_argument("--keep", type=float, help="share of its tokens that a reducing block keeps")
    amount.add_argument("--target-gmacs", type=float, help="multiply-adds an image, 1e9")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights (default: random ones)")
    parser.add_argument("--checkpoint", default="", help="file of weights")
    parser.add_argument("--out", type=Path, default=Path("outputs/tokens.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.image.is_file():
        parser.error(f"no image {str(args.image)!r}")

    try:
        model = timm.create_model(args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint).eval()
        reduce_tokens(model, args.method, r=args.r, keep=args.keep, target_gmacs=args.target_gmacs)
    except (RuntimeError, TypeError, ValueError) as error:
        parser.error(str(error))
    config = resolve_data_config(model=model)
    image = create_transform(**config)(Image.open(args.image).convert("RGB"))
    report = model.reduction.report(image[None])
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    seen = (image * std + mean).clamp(0, 1)

    figure, axes = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
    left = report.size.shape[1]
    titles = (f"{report.grid[0] * report.grid[1]} patches", f"{left} tokens, {report.gmacs:.2f} GMACs")
    for axis, picture, title in zip(axes, (seen, merged_patches(seen, report)), titles, strict=True):
        axis.imshow(picture.permute(1, 2, 0))
        axis.set_title(title)
        axis.axis("off")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(report)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
