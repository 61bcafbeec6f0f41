"""FLOPs of a model, counted without running it (torch's counter, meta device) or by fvcore, from the same formulas.

Convention, here and in every table of this package: one multiply-add is 1 MAC = 2 FLOPs; GMACs = FLOPs / 2e9. Norms,
activations, softmax, pooling and biases count nothing. Published "GFLOPs" of vision backbones are mostly GMACs.
"""
from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count

from visionbb.kernels import flop_formulas

# The CPU's fused attention is absent from torch's registry: without this, attention on the CPU counts 0.
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _cpu_flash not in flop_registry:

    @register_flop_formula(_cpu_flash)
    def _cpu_flash_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)


# Namespaces of torch's own operators; anything else is a custom op, which needs a formula of its own.
_TORCH_NAMESPACES = {"aten", "prim", "prims", "profiler", "inductor", "higher_order", "_c10d_functional", "c10d"}


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward pass (1 MAC = 2 FLOPs), inclusive of children, by module name and by operator.

    `by_module` is keyed as `model.named_modules()`, the whole model under "". `activations` counts the elements that
    convolutions, matrix products and attention ops put out (the "activations" of Radosavovic et al., "Designing Network
    Design Spaces"), softmax-ready attention scores included. `uncounted` names the custom ops that have no formula.
    """

    flops: int
    activations: int
    by_module: dict[str, int]
    by_op: dict[str, int]
    uncounted: tuple[str, ...] = ()

    @property
    def gmacs(self) -> float:
        return self.flops / 2e9

    @property
    def macts(self) -> float:
        """Activations in millions."""
        return self.activations / 1e6


class _Watch(TorchDispatchMode):
    """Notes what torch's counter does not: the outputs of counted ops, and custom ops without a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self.uncounted: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            first = out[0] if isinstance(out, tuple | list) else out
            self.activations += first.numel()
        elif func.namespace not in _TORCH_NAMESPACES:
            self.uncounted[str(func._overloadpacket).replace(".", "::", 1)] = None
        return out


def image_shape(input_size: int | Iterable[int]) -> tuple[int, int, int]:
    """(C, H, W) of an image given as a side in pixels (square, 3 channels), as (H, W) or as (C, H, W)."""
    shape = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)
    shape = (3, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_size must be a side, (H, W) or (C, H, W), all positive, got {input_size!r}")
    return shape


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device: same structure, no data; `model` keeps its tensors, device and mode."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    memo = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(t, torch.Tensor):
                meta = torch.empty_like(t, device="meta")
                memo[id(t)] = nn.Parameter(meta, t.requires_grad) if isinstance(t, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def count_flops(model: nn.Module, input_size: int | Iterable[int], batch_size: int = 1) -> FlopCount:
    """Counts the FLOPs of one forward pass in evaluation mode, on a copy of the model that holds no data.

    Args:
        model: any module that maps (B, C, H, W) images to tensors; it is not touched, wherever it lives.
        input_size: side in pixels (square, 3 channels), (H, W) or (C, H, W).
        batch_size: images in the pass; all counts are of the whole batch.

    Raises:
        ValueError: `input_size` or `batch_size` is not positive.

    Warns:
        UserWarning: the model calls a custom op that has no FLOP formula, so that the total is too low.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images = torch.empty(batch_size, *image_shape(input_size), dtype=_dtype(model), device="meta")
    # Without requires_grad: under no_grad the counter asks views of parameters for a graph that they do not have.
    model = meta_copy(model).eval().requires_grad_(False)
    # no_grad, not inference_mode: under the latter composite ops reach the counter undivided.
    with torch.no_grad(), _Watch() as watch, FlopCounterMode(display=False) as counter:
        model(images)

    counts = counter.get_flop_counts()
    by_op = {str(op): n for op, n in counts.pop("Global", {}).items()}
    root = type(model).__name__
    by_module = {name.removeprefix(root).removeprefix("."): sum(ops.values()) for name, ops in counts.items()}
    if watch.uncounted:
        warnings.warn(
            f"{root} calls custom ops without a FLOP formula, counted as 0: {', '.join(watch.uncounted)}", stacklevel=2
        )
    return FlopCount(counter.get_total_flops(), watch.activations, by_module, by_op, tuple(watch.uncounted))


def fvcore_flops(model: nn.Module, inputs: torch.Tensor | tuple) -> FlopCountAnalysis:
    """fvcore's count of one forward pass, with handles for fused attention and for every op of `visionbb.kernels`.

    The numbers of published tables come from this counter: its unit, "flop", is 1 MAC, and it counts norms (about
    0.3 % of a backbone). It runs the model once, on real tensors.

    Returns:
        The finished analysis: `.total()` MACs, `.by_module()`, `.by_operator()`, `.unsupported_ops()`.
    """
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_macs)
    for name, formula in flop_formulas().items():
        analysis.set_op_handle(name, _fvcore_handle(name, formula))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            model.eval()
            analysis.total()
    finally:
        for module, training in modes:
            module.training = training
    missing = [op for op in analysis.unsupported_ops() if op.split("::")[0] not in _TORCH_NAMESPACES]
    if missing:
        warnings.warn(f"custom ops without a FLOP formula, counted as 0: {', '.join(missing)}", stacklevel=2)
    return analysis


def _fvcore_handle(name: str, formula):
    """An fvcore handle (MACs from graph values) from a formula (FLOPs from shapes and arguments)."""
    namespace, op = name.split("::")
    schema = getattr(getattr(torch.ops, namespace), op).default._schema.arguments

    def handle(inputs, outputs) -> int:
        values = [_value(v) for v in inputs]
        args = [v for v, a in zip(values, schema, strict=True) if not a.kwarg_only]
        kwargs = {a.name: v for v, a in zip(values, schema, strict=True) if a.kwarg_only}
        out = [_value(v) for v in outputs]
        return formula(*args, **kwargs, out_shape=out[0] if len(out) == 1 else tuple(out)) // 2

    return handle


def _sdpa_macs(inputs, outputs) -> int:
    return sdpa_flop_count(*(_value(v) for v in inputs[:3])) // 2


def _value(value: torch._C.Value):
    """What a traced value held: a tensor's shape, a list's items, a constant."""
    if isinstance(value.type(), torch._C.TensorType):
        return torch.Size(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_value(v) for v in value.node().inputs()]
    return value.toIValue()


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
