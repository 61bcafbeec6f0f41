"""Triton kernels on a machine without a GPU: under Triton's interpreter, mended where it is wrong.

The interpreter must be chosen before Triton is imported. So each file of kernel tests has one test that runs the file
once more, in a process of its own that has chosen it.
"""
import os
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture
def run_interpreted():
    def run(path: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib",
                   "-p", "no:cacheprovider", path]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        assert "passed" in run.stdout

    return run


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """The interpreter of Triton 3.6 multiplies the bit patterns of bfloat16, and cuts off float32 where GPUs round it.

    Here it multiplies values, and rounds to the nearest.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, x, to):
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        even = bits + 0x7FFF + (bits >> 16 & 1)
        return TensorHandle((np.where(np.isnan(x.data), bits, even) >> 16).astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture(autouse=True)
def scans(monkeypatch):
    """The interpreter scans value by value, which takes minutes. Here it takes a row of the axis at a time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import ScanOps

    def scan(self, inputs):
        rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        found, state = [np.empty_like(x) for x in rows], None
        for i in range(len(rows[0])):
            step = tuple(self.to_tensor(x[i].copy(), y.dtype) for x, y in zip(rows, inputs))
            state = step if state is None else self.combine_fn.fn(*state, *step)
            for out, value in zip(found, state):
                out[i] = value.handle.data
        return [self.to_tensor(np.moveaxis(x, 0, self.axis), y.dtype) for x, y in zip(found, inputs)]

    monkeypatch.setattr(ScanOps, "generic_scan", scan)
