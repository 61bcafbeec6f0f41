"""One line a model: size, work, speed and memory, in the columns of timm's benchmark files."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from visionbb import kernels

from .flops import count_flops
from .memory import peak_memory, tensor_bytes
from .output import table
from .subject import subject
from .timing import forward_call, interleaved, stopwatch, train_call


@dataclass(frozen=True)
class ModelProfile:
    """What a model costs. The `infer_*` and `train_*` columns and `param_count` are those of timm's benchmark files."""

    model: str
    infer_img_size: int  # pixels, the width
    infer_batch_size: int
    infer_samples_per_sec: float  # images per second at that batch size, from the median step
    infer_step_time: float  # ms, median
    infer_gmacs: float  # 1e9 multiply-adds of one image, each 2 FLOPs
    infer_macts: float  # 1e6 elements put out by convolutions, matrix products and attention, one image
    param_count: float  # 1e6
    latency_p50_ms: float  # batch 1
    latency_p90_ms: float
    peak_memory_mb: float  # 1e6 bytes: weights, images and the most that a forward pass holds beside them
    train_samples_per_sec: float | None  # forward and backward; None where not asked for
    train_step_time: float | None  # ms, median
    train_peak_memory_mb: float | None  # gradients included
    device: str
    dtype: str
    threads: int
    backend: str
    torch: str


def profile_model(name_or_model: str | nn.Module, input_size: int | Iterable[int] | None = None, **kwargs):
    """The `ModelProfile` of one model; arguments as in `profile_models`."""
    return profile_models([name_or_model], input_size, **kwargs)[0]


def profile_models(
    models: Sequence[str | nn.Module],
    input_size: int | Iterable[int] | None = None,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    train: bool = False,
    repeats: int = 10,
    latency_repeats: int = 30,
    warmup: int = 2,
    clock: str = "wall",
) -> list[ModelProfile]:
    """Measures models in turns, in one process, so that their times can be compared.

    Args:
        models: timm names (visionbb's included), with a reduction of tokens or without, see `subject.subject`, or
            modules, which are copied and stay as they are.
        input_size: side in pixels, (H, W) or (C, H, W); None takes each model's own.
        batch_size: images per step; latency is always that of one image.
        backend: the path of visionbb's ops, see `visionbb.kernels.use`. FLOPs do not depend on it.
        train: also time training steps (forward and backward).
        repeats, latency_repeats, warmup: rounds measured at `batch_size`, at batch 1, and thrown away before each.
        clock: "wall" or, on the CPU, "cpu" for processor time.

    Raises:
        ValueError: an unknown model, or an argument outside its range.
    """
    subjects = [subject(m, input_size, device=device, dtype=dtype) for m in models]
    counts = [count_flops(s.model, s.shape) for s in subjects]
    rounds = {"warmup": warmup, "stopwatch": stopwatch(device, clock)}

    def measure(make_call, size: int, repeats: int):
        calls = {i: make_call(s.model, s.images(size)) for i, s in enumerate(subjects)}
        return interleaved(calls, repeats=repeats, **rounds)

    def peaks(make_call) -> list[float]:
        batches = ((s.model, s.images(batch_size)) for s in subjects)
        return [(tensor_bytes(model, x) + peak_memory(make_call(model, x), device)) / 1e6 for model, x in batches]

    with kernels.use(backend):
        steps = measure(forward_call, batch_size, repeats)
        latencies = measure(forward_call, 1, latency_repeats)
        memory = peaks(forward_call)
        train_steps = measure(train_call, batch_size, repeats) if train else [None] * len(subjects)
        train_memory = peaks(train_call) if train else [None] * len(subjects)

    return [
        ModelProfile(
            model=s.name,
            infer_img_size=s.shape[-1],
            infer_batch_size=batch_size,
            infer_samples_per_sec=batch_size / steps[i].median,
            infer_step_time=steps[i].median * 1e3,
            infer_gmacs=counts[i].gmacs,
            infer_macts=counts[i].macts,
            param_count=sum(p.numel() for p in s.model.parameters()) / 1e6,
            latency_p50_ms=latencies[i].percentile(50) * 1e3,
            latency_p90_ms=latencies[i].percentile(90) * 1e3,
            peak_memory_mb=memory[i],
            train_samples_per_sec=batch_size / train_steps[i].median if train else None,
            train_step_time=train_steps[i].median * 1e3 if train else None,
            train_peak_memory_mb=train_memory[i],
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            backend=backend,
            torch=torch.__version__,
        )
        for i, s in enumerate(subjects)
    ]


def profile_table(profiles: Sequence[ModelProfile]) -> Table:
    """The profiles as one rich table; all must come from one call of `profile_models`."""
    first = profiles[0]
    columns = {
        "model": lambda p: p.model,
        "image": lambda p: str(p.infer_img_size),
        "params M": lambda p: f"{p.param_count:.2f}",
        "GMACs": lambda p: f"{p.infer_gmacs:.2f}",
        "images/s": lambda p: f"{p.infer_samples_per_sec:.1f}",
        "latency p50 ms": lambda p: f"{p.latency_p50_ms:.1f}",
        "p90 ms": lambda p: f"{p.latency_p90_ms:.1f}",
        "peak memory MB": lambda p: f"{p.peak_memory_mb:.0f}",
    }
    if first.train_step_time is not None:
        columns["train images/s"] = lambda p: f"{p.train_samples_per_sec:.1f}"
        columns["train peak MB"] = lambda p: f"{p.train_peak_memory_mb:.0f}"
    caption = (
        f"images/s and memory at batch {first.infer_batch_size}, latency at batch 1; 1 GMAC = 2 GFLOPs\n"
        f"{first.device}, {first.dtype}, threads: {first.threads}, backend {first.backend}, torch {first.torch}"
    )
    return table("Model profiles", profiles, columns, caption)
