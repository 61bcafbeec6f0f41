"""A scatter plot of measured models with its Pareto front."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from .output import plain
from .pareto import pareto_front

# What a column is called on an axis, and which way is better.
AXES = {
    "infer_gmacs": ("GMACs per image", "min"),
    "infer_macts": ("activations per image, millions", "min"),
    "param_count": ("parameters, millions", "min"),
    "infer_samples_per_sec": ("images / s", "max"),
    "train_samples_per_sec": ("training images / s", "max"),
    "latency_p50_ms": ("latency p50 at batch 1, ms", "min"),
    "latency_p90_ms": ("latency p90 at batch 1, ms", "min"),
    "peak_memory_mb": ("peak memory, MB", "min"),
    "train_peak_memory_mb": ("peak memory in training, MB", "min"),
}
_FRONT, _REST, _INK = "#c2410c", "#94a3b8", "#1e293b"


def plot_models(
    profiles: Sequence[Any], path: str | Path, x: str = "infer_gmacs", y: str = "infer_samples_per_sec"
) -> Figure:
    """Draws one labelled point a model on logarithmic axes; the Pareto-optimal ones are filled and joined by steps.

    Args:
        profiles: `ModelProfile`s, from one call of `profile_models`.
        path: where to write; the suffix chooses the format (png, svg, pdf).
        x, y: columns, among `AXES`.

    Returns:
        The figure that was written.

    Raises:
        ValueError: a column that cannot be drawn, or was not measured.
    """
    for name, column in (("x", x), ("y", y)):
        if column not in AXES:
            raise ValueError(f"{name} must be one of {', '.join(AXES)}, got {column!r}")
    rows = [plain(p) for p in profiles]
    front = pareto_front(rows, {x: AXES[x][1], y: AXES[y][1]})

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    ax = figure.add_subplot()
    ax.set(xscale="log", yscale="log", xlabel=AXES[x][0], ylabel=AXES[y][0])
    ax.margins(0.18)
    ax.grid(which="both", color="#e2e8f0", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)

    steps = sorted((rows[i][x], rows[i][y]) for i in front)
    where = "post" if AXES[x][1] == "min" else "pre"
    ax.step(*zip(*steps, strict=True), where=where, color=_FRONT, linewidth=1.2, linestyle="--", zorder=2)
    others = [i for i in range(len(rows)) if i not in front]
    for label, chosen, colour in (("Pareto-optimal", front, _FRONT), ("dominated", others, _REST)):
        if chosen:
            points = [rows[i][x] for i in chosen], [rows[i][y] for i in chosen]
            ax.scatter(*points, s=64, color=colour, edgecolor="white", linewidth=1, zorder=3, label=label)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=2, fontsize=9, handletextpad=0.1)

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    first = profiles[0]
    ax.set_title(
        f"{first.device}, {first.dtype}, batch {first.infer_batch_size}, threads: {first.threads}, torch {first.torch}",
        fontsize=9, color="#64748b", loc="left",
    )
    _label(figure, ax, [(row["model"], row[x], row[y]) for row in rows])
    figure.savefig(path, dpi=160)
    return figure


# Where a name may stand, in points from its dot: beside it, and ever further away, then at the end of a line.
_PLACES = [
    (sign * dx, dy, "left" if sign > 0 else "right")
    for dx, dys in ((8, (-3,)), (7, (4, -10)), (18, (-3, 14, -20)), (30, (26, -32)), (44, (40, -46)))
    for dy in dys
    for sign in (1, -1)
]


def _label(figure: Figure, ax, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each name beside its dot, at the first place where it covers no dot and no other name."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes must not move under the labels
    dots = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in ax.transData.transform([p[1:] for p in points])]
    taken = []
    for name, *point in points:
        for dx, dy, side in _PLACES:
            text = ax.annotate(
                name, point, (dx, dy), textcoords="offset points", ha=side, fontsize=9, color=_INK, zorder=4,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
            box = text.get_window_extent()
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not box.count_overlaps(dots + taken):
                break
            text.remove()
        else:  # nowhere is free: better on top of something than missing
            ax.add_artist(text)
        if abs(dx) > 8:
            line = {"arrowstyle": "-", "color": _INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
            ax.annotate("", point, (dx, dy + 3), textcoords="offset points", arrowprops=line)
        taken.append(box)
