"""Proof without a GPU: compiles the kernels' launches ahead of time, and reads what the compilers made of them.

An op folder takes part by a module `report` with a function `cases()`, which lists its launches on meta tensors.
"""
from __future__ import annotations

import importlib.util
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
POINTED = TYPES | {torch.int32: "i32", torch.int64: "i64"}
MATRIX_INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"mma\.sync", "mfma": r"v_mfma"}


class Case(NamedTuple):
    """One launch that a model makes."""

    op: str
    shape: str
    models: tuple[str, ...]
    dtype: str
    launch: Launch
    work: float  # executed over useful work


class Build(NamedTuple):
    """What a compiler made of a launch, for one program; `error` alone where it failed."""

    registers: int = 0  # a thread
    spills: int = 0  # NVIDIA: bytes; AMD: registers
    shared: int = 0  # bytes
    matrix: dict[str, int] = {}  # matrix instructions by kind, in the text of the program
    error: str | None = None

    @property
    def sound(self) -> bool:
        return self.error is None and self.spills == 0


class Row(NamedTuple):
    """A binary, and the cases that share it."""

    kernel: str
    target: str
    cases: tuple[Case, ...]
    build: Build


def cases() -> Iterator[Case]:
    """The cases of all op folders."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        name = f"{__package__}.{module.name}.report"
        if module.ispkg and importlib.util.find_spec(name):
            yield from importlib.import_module(name).cases()


def source(launch: Launch) -> ASTSource:
    """The launch as Triton's own launcher would specialise it: by types, ones, and multiples of 16."""
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...], specialize: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(x, (*path, i), specialize) for i, x in enumerate(value))
        if value is None or (specialize and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or (specialize and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{POINTED[value.dtype]}"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe(value, (i,), not parameter.do_not_specialize)
    return ASTSource(launch.kernel, signature, constants, attributes)


def build(launch: Launch, target: str) -> Build:
    """Compiles for one of TARGETS; needs a process without Triton's interpreter, and no GPU."""
    try:
        gpu = TARGETS[target]
        compiled = triton.compile(source(launch), target=gpu, options=launch.options(gpu))
    except Exception as error:  # compilers raise what they like, and the report is to go on
        return Build(error=f"{type(error).__name__}: {error}")
    read = _read_nvidia if gpu.backend == "cuda" else _read_amd
    text = compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    matrix = {kind: n for kind, pattern in MATRIX_INSTRUCTIONS.items() if (n := len(re.findall(pattern, text)))}
    registers, spills = read(text)
    return Build(registers, spills, compiled.metadata.shared, matrix)


def _read_nvidia(ptx: str) -> tuple[int, int]:
    """Registers and bytes of spills, from the assembler that comes with Triton."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch}", "kernel.ptx", "-o", "kernel.cubin"]
        log = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return int(re.search(r"Used (\d+) registers", log)[1]), spills


def _read_amd(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled registers of both kinds, from the metadata that the assembly ends with."""
    entry = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)\s", assembly)}
    return entry["vgpr_count"], entry["vgpr_spill_count"] + entry["sgpr_spill_count"]


def report(cases: Iterable[Case], targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Row]:
    """One row a binary and target, as they are compiled; launches that specialise to one binary share a row."""
    binaries: dict[tuple, list[Case]] = {}
    for case in cases:
        key = (case.dtype, case.launch.kernel.__name__, source(case.launch).hash(), case.launch[3:])
        binaries.setdefault(key, []).append(case)
    for (_, kernel, *_), shared in binaries.items():
        shared = tuple(shared)
        for target in targets:
            yield Row(kernel, target, shared, build(shared[0].launch, target))
