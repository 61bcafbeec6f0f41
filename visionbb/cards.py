"""Model cards: what is published about a family, as data that code can be held to, and what is measured here.

A card is a Markdown file. Its YAML front matter holds the published facts (`Card`) and its text explains the family.
Two blocks between markers are written by `tools/update_cards.py` alone: "published", tables of the front matter's
results, and "measured", a table of what this package's models cost. A page without front matter is no card: it is on
what is done to models, such as token reduction.
"""
from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import timm
import yaml

from .profiling import compare_models, count_flops
from .profiling.output import environment


class CardError(ValueError):
    """A card that cannot be read: its message names the file, the field, what came and what is allowed."""


# ---- The published facts --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Paper:
    title: str
    arxiv: str  # identifier, such as "2204.07143"
    venue: str | None = None


@dataclass(frozen=True)
class Code:
    """The authors' code that the family was written from."""

    repository: str
    commit: str
    license: str  # SPDX identifier


@dataclass(frozen=True)
class Weights:
    """One pretrained tag of a model, as published."""

    url: str | None
    input_size: int  # pixels a side
    gmacs: float | None = None  # 1e9 multiply-adds of one image, which papers call FLOPs
    top1: float | None = None  # ImageNet-1k validation, %
    recipe: str | None = None  # a key of the card's recipes
    settings: dict[str, Any] = field(default_factory=dict)  # architecture arguments of this tag


@dataclass(frozen=True)
class Detection:
    """COCO val2017, with this model as the backbone; gmacs of the whole detector."""

    box_ap: float
    mask_ap: float | None = None
    gmacs: float | None = None


@dataclass(frozen=True)
class Segmentation:
    """ADE20K validation, with this model as the backbone; gmacs of the whole network."""

    miou: float | None = None  # single scale
    miou_ms: float | None = None  # multi-scale and flip
    gmacs: float | None = None


@dataclass(frozen=True)
class Model:
    weights: dict[str, Weights]  # by pretrained tag
    params: float | None = None  # millions, as published, rounded or cut off
    param_count: int | None = None  # of the authors' code with 1,000 classes, exactly
    coco: dict[str, Detection] = field(default_factory=dict)  # by detector and schedule
    ade20k: dict[str, Segmentation] = field(default_factory=dict)  # by method


@dataclass(frozen=True)
class Card:
    """The front matter of a card.

    `demos` maps models that demonstrate the family, about which nothing is published, to what they are for.
    """

    family: str
    paper: Paper
    models: dict[str, Model]  # by timm name
    code: Code | None = None
    weights_license: str | None = None  # SPDX identifier
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)  # training options, in timm's words
    demos: dict[str, str] = field(default_factory=dict)

    def tags(self) -> dict[str, Weights]:
        """All pretrained tags of the family, as "model.tag"."""
        return {
            f"{name}.{tag}": weights for name, model in self.models.items() for tag, weights in model.weights.items()
        }


def card_paths(folder: Path) -> list[Path]:
    """The Markdown files of a folder that have front matter, by name."""
    return [path for path in sorted(folder.glob("*.md")) if path.read_text(encoding="utf-8").startswith("---\n")]


def read_card(path: str | Path) -> Card:
    """Reads and checks the front matter of a card.

    Raises:
        CardError: no front matter, invalid YAML, a missing or unknown field, or a value of the wrong type.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    front, closed, _ = text.removeprefix("---\n").partition("\n---\n")
    if not (text.startswith("---\n") and closed):
        raise CardError(f"{path.name}: a card starts with YAML front matter between two lines of ---")
    try:
        facts = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise CardError(f"{path.name}: the front matter is not valid YAML: {error}") from None
    try:
        return _parse(Card, facts, "")
    except CardError as error:
        raise CardError(f"{path.name}: {error}") from None


_NAMES = {str: "text", int: "a whole number", float: "a number", dict: "a mapping"}


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value`, from YAML, as the annotated type `kind`; `where` is the dotted path of the field, "" at the top."""
    if isinstance(kind, types.UnionType):  # T | None
        return None if value is None else _parse(typing.get_args(kind)[0], value, where)
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    container = dict if is_dataclass(kind) else typing.get_origin(kind) or kind
    if type(value) is not container:
        hint = " (in quotes)" if kind is str else ""
        raise CardError(f"{where or 'the front matter'} must be {_NAMES[container]}{hint}, got {value!r}")
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in required if name not in value]:
            raise CardError(f"{_join(where, missing[0])} is missing")
        if unknown := [name for name in value if name not in hints]:
            raise CardError(f"{_join(where, unknown[0])} is no field of a card; known here: {', '.join(hints)}")
        return kind(**{name: _parse(hints[name], item, _join(where, name)) for name, item in value.items()})
    if container is dict:
        key_kind, item_kind = typing.get_args(kind)
        return {
            _parse(key_kind, key, f"a key of {where}"): _parse(item_kind, item, _join(where, key))
            for key, item in value.items()
        }
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


# ---- Measurements ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Measured:
    """What was measured of one pretrained tag, random weights."""

    name: str  # "model.tag"
    input_size: int  # pixels a side
    params: int
    gmacs: float  # 1e9 multiply-adds of one image, norms and activations not counted
    images_per_sec: float | None = None

    def cells(self) -> dict[str, str]:
        """Column title to what the card's table shows."""
        cells = {
            "model": f"`{self.name}`",
            "input": str(self.input_size),
            "params M": f"{self.params / 1e6:.2f}",
            "GMACs": f"{self.gmacs:.2f}",
        }
        return cells if self.images_per_sec is None else cells | {"images/s": f"{self.images_per_sec:.1f}"}


def measure(name: str, images_per_sec: float | None = None) -> Measured:
    """Counts a model's parameters and multiply-adds at the input size of its tag, on the meta device: no memory."""
    model = timm.create_model(name, device="meta")
    input_size = model.pretrained_cfg["input_size"]
    params = sum(p.numel() for p in model.parameters())
    return Measured(name, input_size[-1], params, count_flops(model, input_size).gmacs, images_per_sec)


def measure_speed(names: Sequence[str], **settings: Any) -> dict[str, float]:
    """Images per second of inference, by name; models of one input size are timed in turns.

    Args:
        names: "model.tag", each timed at the input size of its tag.
        settings: batch_size, device, dtype, backend, repeats, warmup: as in `profiling.compare_models`.
    """
    by_size: dict[int, list[str]] = {}
    for name in names:
        by_size.setdefault(timm.get_pretrained_cfg(name).input_size[-1], []).append(name)
    return {
        row.model: row.images_per_sec
        for size, group in by_size.items()
        for row in compare_models(group, [size], modes=["forward"], **settings)
    }


def measured_block(rows: Sequence[Measured], speed_settings: Mapping[str, Any] | None = None) -> str:
    """The table of measurements, with a line on how it was made.

    Args:
        rows: at least one.
        speed_settings: what `measure_speed` was called with, if the rows hold speeds.
    """
    note = "Counted on the meta device; 1 GMAC = 2 GFLOPs, norms and activations not counted."
    if speed_settings is not None:
        now = environment(speed_settings.get("device", "cpu"))
        machine = now["cpu"] if now["device"] == "cpu" else now["device"]
        settings = ", ".join(f"{key} {value}" for key, value in speed_settings.items())
        note += (
            f" images/s: inference with random weights on {machine}, {now['threads']} threads, {settings},"
            f" torch {now['torch']}, {now['date'][:10]}."
        )
    return f"{markdown_table([row.cells() for row in rows])}\n\n{note}"


# ---- Blocks of a card's text ----------------------------------------------------------------------------------------

def published_block(card: Card) -> str:
    """The front matter's results as tables: classification by tag, dense prediction by model."""
    tags = [
        {
            "model": f"`{name}.{tag}`",
            "input": str(weights.input_size),
            "params M": _figure(model.params),
            "GMACs": _figure(weights.gmacs),
            "top-1 %": _figure(weights.top1, 1),
        }
        for name, model in card.models.items()
        for tag, weights in model.weights.items()
        if weights.gmacs is not None or weights.top1 is not None
    ]
    detectors = _keys(model.coco for model in card.models.values())
    methods = _keys(model.ade20k for model in card.models.values())
    dense = []
    for name, model in card.models.items():
        row = {"model": f"`{name}`"}
        for key in detectors:
            r = model.coco.get(key)
            row[f"{key}, AP box / mask"] = _pair(r.box_ap, r.mask_ap, r.gmacs) if r else ""
        for key in methods:
            r = model.ade20k.get(key)
            row[f"{key}, mIoU single / multi-scale"] = _pair(r.miou, r.miou_ms, r.gmacs) if r else ""
        if any(list(row.values())[1:]):
            dense.append(row)
    blocks = []
    if tags:
        blocks += ["ImageNet-1k:", markdown_table(tags)]
    if dense:
        blocks += ["COCO (AP) and ADE20K (mIoU), with GMACs of the whole network:", markdown_table(dense)]
    return "\n\n".join(blocks)


def replace_block(text: str, name: str, block: str) -> str:
    """The text of a card with `block` between the markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        CardError: the card has not exactly one pair of those markers.
    """
    begin, end = _markers(name)
    before, _, after = _around(text, name)
    return f"{before}{begin}\n{block}\n{end}{after}"


def read_block(text: str, name: str) -> str:
    """What stands between a pair of markers, see `replace_block`."""
    return _around(text, name)[1].strip("\n")


def read_table(block: str) -> list[dict[str, str]]:
    """The rows of the one table in a block, column title to cell; empty where there is no table."""
    lines = [line for line in block.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(split[0], cells, strict=True)) for cells in split[2:]]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _around(text: str, name: str) -> tuple[str, str, str]:
    begin, end = _markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise CardError(f"a card needs one {begin} followed by one {end}")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before, inside, after


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as a Markdown table, the first column aligned left, the others right."""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _figure(value: float | None, decimals: int | None = None) -> str:
    """A published figure, as it was printed where `decimals` is None; empty where none was published."""
    if value is None:
        return ""
    return f"{value:g}" if decimals is None else f"{value:.{decimals}f}"


def _pair(first: float | None, second: float | None, gmacs: float | None) -> str:
    both = f"{_figure(first, 1) or '-'} / {_figure(second, 1) or '-'}"
    return both if gmacs is None else f"{both} ({gmacs:g} G)"
