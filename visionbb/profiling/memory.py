"""Peak memory of a call, from the allocator's own events."""
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import nn
from torch.autograd.profiler import profile

# Else the profiler's library reports a machine without a GPU as an error on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")


def high_water_mark(changes: Iterable[int]) -> int:
    """The most that was ever held above the start: the largest prefix sum of allocations (+) and releases (-)."""
    return max(accumulate(changes, initial=0))


def peak_memory(call: Callable[[], object], device: torch.device | str) -> int:
    """Bytes that `call` holds at its worst moment, over what was held when it began.

    On CUDA, the caching allocator's `max_memory_allocated`; on the CPU, the running sum of the allocator's events, as
    torch's profiler records them (releases of what was allocated before the call are not seen). The call is run
    once before, so that one-time work (tables, workspaces) is not counted.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"peak_memory measures 'cpu' and 'cuda' devices, got {str(device)!r}")
    call()
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as prof:
        call()
    events = [e for e in prof.kineto_results.events() if e.name() == "[memory]"]
    return high_water_mark(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


def tensor_bytes(*holders: nn.Module | torch.Tensor) -> int:
    """Bytes of the tensors themselves: parameters and buffers of modules, each once."""
    tensors = [
        t for h in holders for t in ((*h.parameters(), *h.buffers()) if isinstance(h, nn.Module) else (h,))
    ]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
