"""The ops that `bench_op` knows: their cases, their baselines, and the peers that compute the same."""
from __future__ import annotations

from ..op_bench import OpBench
from . import column_mean, dwconv2d, linear_attention, na2d, selective_scan, ss2d, token_match, token_merge

OPS: dict[str, OpBench] = {
    "attention_column_mean": column_mean.BENCH, "dwconv2d": dwconv2d.BENCH, "linear_attention": linear_attention.BENCH,
    "na2d": na2d.BENCH, "selective_scan": selective_scan.BENCH, "ss2d": ss2d.BENCH, "token_match": token_match.BENCH,
    "token_merge": token_merge.BENCH,
}
