"""Models against each other: images per second as ratios, and how time grows with the image."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.table import Table

from visionbb import kernels

from .output import table
from .subject import subject
from .timing import forward_call, interleaved, stopwatch, train_call

MODES = {"forward": forward_call, "train": train_call}


@dataclass(frozen=True)
class Comparison:
    """One model at one size: "forward" is inference, "train" is forward and backward."""

    model: str
    mode: str
    img_size: int  # side in pixels
    batch_size: int
    p50_ms: float
    p90_ms: float
    images_per_sec: float  # from the median
    ratio: float  # images per second over those of the baseline, same mode and size


@dataclass(frozen=True)
class Growth:
    """Median time at one size over that at the size before; `exponent` 1 is linear in pixels, 2 quadratic."""

    model: str
    mode: str
    from_size: int
    to_size: int
    factor: float
    exponent: float


def compare_models(
    models: Sequence[str],
    input_sizes: Sequence[int] = (224,),
    *,
    baseline: str | None = None,
    modes: Sequence[str] = ("forward", "train"),
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    repeats: int = 10,
    warmup: int = 2,
    clock: str = "wall",
) -> list[Comparison]:
    """Times models at all sizes in turns, in one process, one mode after the other.

    Args:
        models: timm names, visionbb's included, and how their tokens are reduced: see `subject.subject`.
        input_sizes: sides in pixels.
        baseline: the model that ratios are taken against; None is the first.
        modes: "forward", "train" or both.
        backend: the path of visionbb's ops, see `visionbb.kernels.use`.
        clock: "wall" or, on the CPU, "cpu" for processor time.

    Raises:
        ValueError: an unknown or repeated model, a baseline that is not among them, or another argument out of range.
    """
    baseline = models[0] if baseline is None else baseline
    if baseline not in models:
        raise ValueError(f"baseline must be one of the models, got {baseline!r}, not in {', '.join(models)}")
    if len(set(models)) < len(models) or len(set(input_sizes)) < len(input_sizes):
        raise ValueError(f"models and input_sizes must not repeat, got {list(models)} and {list(input_sizes)}")
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"modes must be among {', '.join(MODES)}, got {', '.join(sorted(unknown))}")

    watch = stopwatch(device, clock)
    subjects = {(m, size): subject(m, size, device=device, dtype=dtype) for size in input_sizes for m in models}
    rows = []
    for mode in modes:
        with kernels.use(backend):
            calls = {key: MODES[mode](s.model, s.images(batch_size)) for key, s in subjects.items()}
            times = interleaved(calls, repeats=repeats, warmup=warmup, stopwatch=watch)
        rows += [
            Comparison(
                model=model,
                mode=mode,
                img_size=size,
                batch_size=batch_size,
                p50_ms=time.median * 1e3,
                p90_ms=time.percentile(90) * 1e3,
                images_per_sec=batch_size / time.median,
                ratio=times[baseline, size].median / time.median,
            )
            for (model, size), time in times.items()
        ]
    return rows


def growth(rows: Sequence[Comparison]) -> list[Growth]:
    """How each model's time grows from one measured size to the next larger one."""
    series: dict[tuple[str, str], list[Comparison]] = {}
    for row in sorted(rows, key=lambda r: r.img_size):
        series.setdefault((row.model, row.mode), []).append(row)
    return [
        Growth(
            model=model,
            mode=mode,
            from_size=a.img_size,
            to_size=b.img_size,
            factor=b.p50_ms / a.p50_ms,
            exponent=math.log(b.p50_ms / a.p50_ms) / math.log(b.img_size**2 / a.img_size**2),
        )
        for (model, mode), points in series.items()
        for a, b in pairwise(points)
    ]


def comparison_table(rows: Sequence[Comparison], baseline: str) -> Table:
    """The comparisons as a rich table."""
    columns = {
        "model": lambda r: r.model,
        "mode": lambda r: r.mode,
        "image": lambda r: str(r.img_size),
        "batch": lambda r: str(r.batch_size),
        "p50 ms": lambda r: f"{r.p50_ms:.1f}",
        "p90 ms": lambda r: f"{r.p90_ms:.1f}",
        "images/s": lambda r: f"{r.images_per_sec:.1f}",
        "ratio": lambda r: f"{r.ratio:.2f}",
    }
    caption = f"times of a batch; ratio: images/s over those of {baseline}"
    return table("Models in turns", rows, columns, caption)


def growth_table(rows: Sequence[Growth]) -> Table:
    """How time grows with the image, as a rich table."""
    columns = {
        "model": lambda r: r.model,
        "mode": lambda r: r.mode,
        "image": lambda r: f"{r.from_size} -> {r.to_size}",
        "time": lambda r: f"x {r.factor:.2f}",
        "exponent": lambda r: f"{r.exponent:.2f}",
    }
    return table("Growth with the image", rows, columns, "exponent: 1 is linear in pixels, 2 quadratic")
