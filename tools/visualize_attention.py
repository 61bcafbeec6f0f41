"""Draw what the scans of a state-space model look at: the hidden attention of some of its modules on an image.

    python tools/visualize_attention.py vim_small --checkpoint vim_s_midclstok_80p5acc.pth --modules blocks.15 blocks.23

Without an image, it is a photograph of scikit-learn's (the extra `demo`). Vim shows what its class token hears, others
what the token in the middle does. Paper: https://arxiv.org/abs/2403.01590
"""
from __future__ import annotations

import sys
from pathlib import Path

# The profile.py in this folder would shadow the standard library's `profile`, which cProfile, and so torch, imports.
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)

import argparse

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_data_config

import visionbb  # noqa: F401  (registers the models)
from visionbb.explain import hidden_attention, row_as_map


def open_image(path: Path | None) -> Image.Image:
    if path is not None:
        return Image.open(path).convert("RGB")
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="timm model name")
    parser.add_argument("--image", type=Path, help="image file")
    parser.add_argument("--modules", nargs="+", default=[""], metavar="NAME", help="modules whose scans are drawn")
    parser.add_argument("--token", type=int, help="row of the matrices (default: class token, or the middle)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="with the published weights")
    weights.add_argument("--checkpoint", default="", help="weights of a file, the authors' or ours")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="picture (default: %(default)s)")
    args = parser.parse_args(argv)

    try:
        model = timm.create_model(args.model, args.pretrained, checkpoint_path=args.checkpoint).eval()
        config = resolve_data_config({}, model=model)
        image = create_transform(**config)(open_image(args.image))
        maps = {name: row_as_map(alpha, args.token)[0]
                for name, alpha in hidden_attention(model, image[None], args.modules).items()}  # fmt: skip
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))

    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    photo = (image * std + mean).clamp(0, 1).permute(1, 2, 0)
    figure = Figure(figsize=(3 * (1 + len(maps)), 3.3), layout="constrained")
    for axes, (name, drawn) in zip(figure.subplots(1, 1 + len(maps)), {args.model: None, **maps}.items(), strict=True):
        axes.imshow(photo)
        if drawn is not None:
            axes.imshow(drawn, cmap="inferno", alpha=0.7, extent=axes.images[0].get_extent(), interpolation="bicubic")
        axes.set_title(name, fontsize="small")
        axes.set_axis_off()
    figure.savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
