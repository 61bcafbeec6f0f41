"""Time of calls that are measured in turns, so that drift of the machine falls on all of them alike."""
from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]
# Runs a call once and says how many seconds it took.
Stopwatch = Callable[[Call], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, in the order measured."""

    samples: tuple[float, ...]

    @cached_property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        """The smallest time that at least `percent` % of the calls did not exceed, by linear interpolation.

        Raises:
            ValueError: `percent` is outside 0..100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be between 0 and 100, got {percent}")
        ordered = sorted(self.samples)
        position = (len(ordered) - 1) * percent / 100
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def wall_clock(call: Call) -> float:
    """Seconds on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_clock(call: Call) -> float:
    """Seconds of processor time, summed over this process's threads: steadier than the wall on a shared machine."""
    start = time.process_time()
    call()
    return time.process_time() - start


def cuda_clock(call: Call, window: int = 1) -> float:
    """Seconds per call between two CUDA events around `window` calls, on a device that was idle before.

    A window of many calls hides the host's launch time of all but the first, unless the host is the slower side.
    """
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(window):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / window


def stopwatch(device: torch.device | str, clock: str = "wall", window: int = 1) -> Stopwatch:
    """The stopwatch for calls on `device`.

    Args:
        device: where the work runs; CUDA always uses events.
        clock: "wall" or "cpu" (processor time), for work on the CPU.
        window: calls in one CUDA measurement.

    Raises:
        ValueError: another clock, or "cpu" for work that the CPU only launches.
    """
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock must be 'wall' or 'cpu', got {clock!r}")
    on_cpu = torch.device(device).type == "cpu"
    if clock == "cpu" and not on_cpu:
        raise ValueError(f"clock 'cpu' measures work on the CPU only, got device {str(device)!r}")
    if torch.device(device).type == "cuda":
        return partial(cuda_clock, window=window)
    return cpu_clock if clock == "cpu" else wall_clock


def interleaved(
    calls: Mapping[Key, Call], *, repeats: int = 20, warmup: int = 3, stopwatch: Stopwatch = wall_clock
) -> dict[Key, Timing]:
    """Times several calls round by round: each round runs every call once, in an order drawn anew.

    A call finds the caches as the one before it left them, which must not be the same one in every round.

    Args:
        calls: what to time, by name.
        repeats: measured rounds.
        warmup: rounds before them that are not measured.
        stopwatch: runs a call once and returns seconds, see `stopwatch`.

    Raises:
        ValueError: `repeats` below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    for round_ in range(-warmup, repeats):
        draw.shuffle(order)
        for name in order:
            seconds = stopwatch(calls[name])
            if round_ >= 0:
                samples[name].append(seconds)
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def forward_call(model: nn.Module, images: torch.Tensor) -> Call:
    """One inference pass of `model`, which is put in evaluation mode now."""
    model.eval()

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


def train_call(model: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> Call:
    """One training step: forward, cross-entropy, backward and, if given, the optimizer's step; no gradients stay.

    `model` is put in training mode now; it maps (B, C, H, W) to (B, classes) logits.
    """
    model.train()
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        F.cross_entropy(model(images).float(), targets).backward()
        if optimizer is not None:
            optimizer.step()
        for p in model.parameters():
            p.grad = None

    return step
