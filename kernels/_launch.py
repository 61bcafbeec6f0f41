"""One launch of a Triton kernel as data: run it on tensors, or compile it ahead of time from meta tensors (`_aot`)."""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._dispatch import interpreted

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

PROGRAMS = 1024  # of a launch, that keep any GPU busy


class Launch(NamedTuple):
    kernel: JITFunction
    programs: int
    arguments: dict[str, Any]  # by name, constexprs among them
    threads: int = 128  # a program
    stages: int = 1  # of the software pipeline; without one, other programs on the same processor hide the loads
    registers: int | None = None  # a thread may have, on NVIDIA; None lets ptxas choose, and spill to fit more programs

    def options(self, target: GPUTarget) -> dict[str, int]:
        """Compile options on a GPU; its warps have 32 or 64 threads."""
        options = {"num_warps": self.threads // target.warp_size, "num_stages": self.stages}
        if self.registers and target.backend == "cuda":
            options["maxnreg"] = self.registers
        return options

    def run(self) -> None:
        """Launches on the device of the tensors among the arguments, which need not be the current one."""
        if interpreted():
            self.kernel[(self.programs,)](**self.arguments)
            return
        tensor = next(x for x in self.arguments.values() if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.options(_target(tensor.device)))


@functools.cache
def _target(device: torch.device) -> GPUTarget:
    """Of `device`, which is the current one."""
    from triton.runtime import driver

    return driver.active.get_current_target()


def shares(tokens: int, chunk: int, programs: int, least: int) -> tuple[int, int]:
    """Into how many shares a sum over tokens is split, and the tokens of each, a multiple of `chunk`.

    No more than make PROGRAMS of the `programs` that there are without a split, nor of fewer than `least` tokens.
    """
    splits = max(1, tokens // max(-(-tokens * programs // PROGRAMS), least))
    share = -(-tokens // (splits * chunk)) * chunk
    return -(-tokens // share), share
