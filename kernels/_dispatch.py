"""Which path of an op runs: the caller's choice, else the best one for the tensor's device."""
from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import is_grad_enabled
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

BACKENDS = ("auto", "reference", "portable", "triton")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# One choice for the process, not for a thread: autograd runs the backward of an op in threads of its own.
_choice = _checked(os.environ.get("VISIONBB_BACKEND", "auto"), "VISIONBB_BACKEND")


@contextlib.contextmanager
def use(backend: str):
    """Run the ops inside the block on one path, in every thread. Scripted modules know no reference path.

    Args:
        backend: "reference" (the definition, exact and slow), "portable" (plain PyTorch), "triton" (fused kernels;
            CPU tensors only under `TRITON_INTERPRET=1`) or "auto" (the default: triton where it can, else portable).

    Raises:
        ValueError: `backend` is none of these.
    """
    global _choice
    before, _choice = _choice, _checked(backend, "backend")
    try:
        yield
    finally:
        _choice = before


@functools.cache
def has_triton() -> bool:
    """Whether a Triton that can compile the kernels (3.4 or newer) is installed; it is not imported by asking."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # builds for ROCm bear other names
        return True
    return tuple(map(int, version.split(".")[:2])) >= (3, 4)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def exporting() -> bool:
    """Whether a graph is being recorded that must run without this package (torch.export, ONNX)."""
    # The flag behind torch.compiler.is_exporting(), which Dynamo takes to be true under torch.compile too. Torch 2.6
    # has none: there an exported program keeps our op, and needs this package to run.
    return getattr(torch.compiler, "_is_exporting_flag", False) or torch.onnx.is_in_onnx_export()


def unwatched() -> bool:
    """Whether PyTorch runs what is called, as it is called: no mode, transform or recording of a graph watches."""
    # Asked at every call of every op: between operators that fill the caches, each further name or function costs us.
    return not (
        is_dynamo_compiling()
        or _is_tracing()  # as the older of the two ONNX exporters does
        or _len_torch_dispatch_stack()  # FLOP counters, fake tensors, torch.export
        or peek_interpreter_stack() is not None  # vmap, grad, jvp
        or forward_ad._current_level >= 0
    )


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is done with any of these."""
    if is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def eager_inference(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing but the result matters: a call is `unwatched`, and no gradient of these tensors is wanted.

    Meta tensors, which have no numbers to compute with, do not count; the first one tells.

    There an op may run without PyTorch's dispatcher (some 60 us a call for ops written in Python), or by functions that
    know nothing of all these.
    """
    return unwatched() and not wants_gradient(*tensors) and not (tensors and tensors[0].is_meta)


def direct(op: Callable, run: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """`op` with its gradient; without PyTorch's dispatcher, which takes some 0.3 ms, where it is `unwatched` on a CPU.

    Args:
        op: a custom op that gives what `run` gives, of the same arguments, of which the first is a tensor.
        setup_context, backward: as registered for its gradient.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            result = run(*args)
            setup_context(ctx, args, result)
            return result

    Direct.backward = staticmethod(backward)
    return lambda *args: (Direct.apply if args[0].is_cpu and unwatched() else op)(*args)


def caches() -> int:
    """By how much more than one core's cache the threads of an operator hold; a few at most, for memory's sake.

    Work that is cut into pieces which stay in cache takes larger pieces on more threads: fewer operators, at each of
    which all threads wait for the last.
    """
    return min(torch.get_num_threads(), 4)


def reference_chosen() -> bool:
    return _choice == "reference"


def resolve(refuses: Callable[..., str | None], x: torch.Tensor, *args) -> str:
    """The path that serves `x` inside a registered op: "portable" or "triton".

    Args:
        refuses: why the op's Triton kernels cannot take x and args, or None if they can; asked where Triton can run.
        x: an input of the op; its device decides under "auto".

    Raises:
        RuntimeError: "triton" was asked for by name where it cannot run.
    """
    choice = _choice
    if choice in ("reference", "portable"):
        return "portable"
    if choice == "triton":
        if not has_triton():
            raise RuntimeError("backend 'triton' was asked for, but triton 3.4 or newer is not installed")
        if not (x.is_cuda or interpreted()):
            raise RuntimeError(
                f"backend 'triton' was asked for, but its kernels need a GPU tensor and got one on {x.device}"
                " (TRITON_INTERPRET=1 runs them on the CPU, slowly)"
            )
        reason = refuses(x, *args)
        if reason:
            raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
        return choice
    return "triton" if x.is_cuda and has_triton() and not refuses(x, *args) else "portable"
