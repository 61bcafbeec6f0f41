"""What models and ops cost: FLOPs, time, memory, and which of them are Pareto-optimal."""
from .compare import Comparison, Growth, compare_models, growth
from .flops import FlopCount, count_flops, fvcore_flops
from .memory import peak_memory
from .op_bench import OpResult, bench_op
from .pareto import pareto_front
from .report import ModelProfile, profile_model, profile_models
from .timing import Timing, interleaved

__all__ = [
    "Comparison",
    "FlopCount",
    "Growth",
    "ModelProfile",
    "OpResult",
    "Timing",
    "bench_op",
    "compare_models",
    "count_flops",
    "fvcore_flops",
    "growth",
    "interleaved",
    "pareto_front",
    "peak_memory",
    "profile_model",
    "profile_models",
]
