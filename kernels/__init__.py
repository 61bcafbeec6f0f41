"""Shared 2-D ops: pure functions on channels-last tensors, one folder each; import as `visionbb.kernels`.

An op's paths agree: `reference` (the definition), `portable` (plain PyTorch, any device, exportable), `triton` (fused
GPU kernels). `use(...)` chooses one for a block of code, `VISIONBB_BACKEND` for a process.
"""
from ._dispatch import BACKENDS, has_triton, use
from ._flops import flop_formulas
from .column_mean import attention_column_mean
from .dwconv import dwconv2d
from .linear_attention import linear_attention
from .neighborhood import merge_attentions, na2d, na2d_qkvpacked
from .rotary import Rotary, rotary2d
from .scan import linear_scan, scan_routes, selective_scan, ss2d
from .ssd import ssd
from .token_match import token_match
from .token_merge import token_merge, token_unmerge
from .wkv import bi_wkv

__all__ = [
    "BACKENDS", "Rotary", "attention_column_mean", "bi_wkv", "dwconv2d", "flop_formulas", "has_triton",
    "linear_attention", "linear_scan", "merge_attentions", "na2d", "na2d_qkvpacked", "rotary2d", "scan_routes",
    "selective_scan", "ss2d", "ssd", "token_match", "token_merge", "token_unmerge", "use",
]
