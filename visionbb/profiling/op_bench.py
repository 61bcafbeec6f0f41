"""An op's paths and its peers on one input, checked against the reference, then timed in turns."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from visionbb import kernels

from .memory import peak_memory
from .output import table
from .timing import interleaved, stopwatch

# Relative error (Frobenius norm, against float64) beyond which a result is wrong, not rounded.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# CUDA calls between two events, so that launches of short kernels do not count.
CUDA_WINDOW = 20


class Unavailable(Exception):
    """Raised by a contestant that cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute an op.

    Attributes:
        prepare: (case, device) -> function of the inputs; builds what may be cached across calls and, if the
            contestant cannot run here, raises `Unavailable`.
        backend: the path of visionbb's ops while it runs, see `visionbb.kernels.use`.
        takes: how many of the inputs, from the first, it has arguments for; None is all of them.
    """

    prepare: Callable[[Any, torch.device], Callable[..., torch.Tensor]]
    backend: str = "auto"
    takes: int | None = None


@dataclass(frozen=True)
class OpBench:
    """What there is to measure about one op.

    Attributes:
        cases: the shapes; `str(case)` names one.
        inputs: (case, batch size, device, dtype) -> tensors, those with a batch axis (the first) before the others.
            Gradients are those of the inputs that require one, if any do.
        batched: how many of them have one.
        reference: case -> the definition, a function of the inputs or of the first few of them.
        contestants: by name; the first is the baseline of speed-ups.
        moved_bytes: (case, batch size, bytes per element) -> bytes that a forward pass has to read and write.
    """

    cases: tuple[Any, ...]
    inputs: Callable[..., tuple[torch.Tensor, ...]]
    batched: int
    reference: Callable[[Any], Callable[..., torch.Tensor]]
    contestants: Mapping[str, Contestant]
    moved_bytes: Callable[[Any, int, int], int]


@dataclass(frozen=True)
class OpResult:
    """One contestant on one case: medians in ms, speed-ups over the baseline, memory in 1e6 bytes over the inputs.

    Where `note` says why a contestant was not timed, the numbers are None; those of training are where an op has no
    gradient.
    """

    case: str
    contestant: str
    forward_ms: float | None = None
    forward_speedup: float | None = None
    train_ms: float | None = None  # forward and backward
    train_speedup: float | None = None
    gbytes_per_sec: float | None = None  # what the forward pass has to move, over its time
    forward_extra_mb: float | None = None  # outputs included
    train_extra_mb: float | None = None
    error: float | None = None  # worst relative error among output and gradients
    wrong: bool = False
    note: str = ""


def bench_op(
    op: OpBench,
    case: Any,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    contestants: Sequence[str] | None = None,
    repeats: int = 5,
    warmup: int = 1,
    clock: str = "wall",
) -> list[OpResult]:
    """Checks, then times an op's contestants on one case.

    Timed is the call on ready inputs, without autograd, and forward plus backward to the inputs; not timed are
    index tables and masks that depend on shapes alone, which every contestant may keep. A contestant whose output or
    gradients differ from the reference is reported as wrong and not timed.

    Args:
        contestants: names to take, in that order; None takes all.
        repeats, warmup: rounds measured, and thrown away before.
        clock: "wall" or, on the CPU, "cpu" for processor time.

    Raises:
        ValueError: an unknown contestant, or another argument out of range.
    """
    names = list(op.contestants) if contestants is None else list(contestants)
    if unknown := [n for n in names if n not in op.contestants]:
        raise ValueError(f"unknown contestants {', '.join(unknown)}; this op has {', '.join(op.contestants)}")
    device = torch.device(device)
    inputs = op.inputs(case, batch_size, device, dtype)
    watch = stopwatch(device, clock, CUDA_WINDOW)

    forwards, trains, errors, notes = {}, {}, {}, {}
    for name in names:
        contestant = op.contestants[name]
        args = inputs[: contestant.takes]
        try:
            with kernels.use(contestant.backend):
                function = contestant.prepare(case, device)
                errors[name] = _error(op, case, function, args)
        except (Unavailable, NotImplementedError) as reason:  # the latter from peers without a backward here
            notes[name] = str(reason)
            continue
        if contestant.takes is not None:
            notes[name] = f"takes {contestant.takes} of the {len(inputs)} inputs"
        if not errors[name] <= TOLERANCE[dtype]:
            notes[name] = f"wrong: relative error {errors[name]:.1e}"
            continue
        forwards[name] = _forward(function, args, contestant.backend)
        if any(t.requires_grad for t in args):
            trains[name] = _train(function, args, contestant.backend)

    forward = interleaved(forwards, repeats=repeats, warmup=warmup, stopwatch=watch)
    train = interleaved(trains, repeats=repeats, warmup=warmup, stopwatch=watch)
    baseline = next(iter(forward), None)

    def trained(name: str) -> dict[str, float]:
        if name not in trains:
            return {}
        return dict(
            train_ms=train[name].median * 1e3,
            train_speedup=train[baseline].median / train[name].median,
            train_extra_mb=peak_memory(trains[name], device) / 1e6,
        )

    def result(name: str) -> OpResult:
        if name not in forward:
            return OpResult(str(case), name, error=errors.get(name), wrong=name in errors, note=notes[name])
        seconds = forward[name].median
        return OpResult(
            case=str(case),
            contestant=name,
            forward_ms=seconds * 1e3,
            forward_speedup=forward[baseline].median / seconds,
            gbytes_per_sec=op.moved_bytes(case, batch_size, dtype.itemsize) / seconds / 1e9,
            forward_extra_mb=peak_memory(forwards[name], device) / 1e6,
            error=errors[name],
            note=notes.get(name, ""),
            **trained(name),
        )

    return [result(name) for name in names]


def _forward(function, args, backend):
    def call():
        with kernels.use(backend), torch.no_grad():
            return function(*args)

    return call


def _differentiated(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors if t.requires_grad]


def _train(function, args, backend):
    with kernels.use(backend), torch.no_grad():
        dout = torch.randn_like(function(*args))

    def call():
        with kernels.use(backend):
            return torch.autograd.grad(function(*args), _differentiated(args), dout)

    return call


def _error(op: OpBench, case: Any, function: Callable, args: tuple[torch.Tensor, ...]) -> float:
    """Worst relative error of output and gradients on the first and the last image of the batch.

    The contestant gets the whole batch; a gradient that is zero for the images between makes those of the inputs
    without a batch axis comparable too.
    """
    ends = [0, -1] if len(args[0]) > 1 else [0]

    def first_and_last(tensors):
        return [t[ends] if i < op.batched and t is not None else t for i, t in enumerate(tensors)]

    def gradients(out, args, dout):  # one for each, None where it asks for none
        found = iter(torch.autograd.grad(out, asked, dout) if (asked := _differentiated(args)) else ())
        return [next(found) if t.requires_grad else None for t in args]

    out = function(*args)
    dout = torch.zeros_like(out)
    dout[ends] = torch.randn_like(out[ends])
    grads = first_and_last(gradients(out, args, dout))

    exact = [
        (t.detach().double() if t.is_floating_point() else t).requires_grad_(arg.requires_grad)
        for t, arg in zip(first_and_last(args), args, strict=True)
    ]
    with kernels.use("reference"):
        want = op.reference(case)(*exact)
        want_grads = gradients(want, exact, dout[ends].double())
    pairs = [(out[ends], want), *zip(grads, want_grads, strict=True)]
    return max(((got.double() - ref).norm() / ref.norm()).item() for got, ref in pairs if ref is not None)


def results_table(title: str, rows: Sequence[OpResult]) -> Table:
    """One case's results as a rich table, notes below it; of training only where there are gradients."""
    timed = [r for r in rows if r.forward_ms is not None]
    columns = {
        "contestant": lambda r: r.contestant,
        "forward ms": lambda r: f"{r.forward_ms:.3f}",
        "speed-up": lambda r: f"{r.forward_speedup:.2f}",
        "forward+backward ms": lambda r: f"{r.train_ms:.3f}",
        "speed-up ": lambda r: f"{r.train_speedup:.2f}",
        "GB/s": lambda r: f"{r.gbytes_per_sec:.1f}",
        "forward MB": lambda r: f"{r.forward_extra_mb:.1f}",
        "f+b MB": lambda r: f"{r.train_extra_mb:.1f}",
        "error": lambda r: f"{r.error:.0e}",
    }
    if any(r.train_ms is None for r in timed):
        columns = {k: v for k, v in columns.items() if k not in ("forward+backward ms", "speed-up ", "f+b MB")}
    notes = [f"{r.contestant}: {r.note}" for r in rows if r.note]
    caption = "\n".join(["medians; memory is beyond the inputs; error against float64", *notes])
    return table(title, timed, columns, caption)
