"""How measurements leave the package: one table on the terminal, CSV in timm's columns, JSON with its circumstances."""
from __future__ import annotations

import csv
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import visionbb


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measurement depended on: processor, GPU, versions, threads, date (UTC)."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "visionbb": visionbb.__version__,
        **{package: _version(package) for package in ("torch", "timm", "triton")},
        "cuda": torch.version.cuda if on_cuda else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def plain(row: Any) -> dict[str, Any]:
    """A dataclass instance as a flat dict, floats to 6 significant digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(row).items()}


def write_csv(path: str | Path, rows: Sequence[Any]) -> None:
    """Writes dataclass instances of one type, one a line, the fields as columns; None is an empty cell.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty: nothing to write")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
        writer.writeheader()
        writer.writerows(map(plain, rows))


def write_json(
    path: str | Path,
    rows: Sequence[Any],
    device: torch.device | str = "cpu",
    *,
    measured_in: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Writes dataclass instances as {"environment": ..., "settings": ..., "results": [...]}.

    Args:
        measured_in: the environment, if it is not this one.
    """
    where = environment(device) if measured_in is None else measured_in
    document = {"environment": where, "settings": settings, "results": [plain(r) for r in rows]}
    Path(path).write_text(json.dumps(document, indent=2) + "\n")


def table(title: str, rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]], caption: str = "") -> Table:
    """A rich table with one line a row; `columns` maps a header to what it shows of a row, the first aligned left."""
    out = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, header in enumerate(columns):
        out.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        out.add_row(*(show(row) for show in columns.values()))
    return out


def show(*tables: Table) -> None:
    """Prints tables to stdout, at full width where it is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    for t in tables:
        console.print(t)
