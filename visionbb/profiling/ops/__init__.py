"""The ops that `bench_op` knows: their cases, their baselines, and the peers that compute the same."""
from __future__ import annotations

from ..op_bench import OpBench
from . import na2d

OPS: dict[str, OpBench] = {"na2d": na2d.BENCH}
