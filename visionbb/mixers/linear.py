"""Linear layers by the faster of the two matrix products that PyTorch has on a CPU."""

import platform

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import nn
from torch._C import _get_mkldnn_enabled, _is_any_autocast_enabled

from ..kernels._dispatch import eager_inference, unwatched, wants_gradient

# PyTorch sends float32 to MKL. oneDNN, which it holds too, takes 0.55 to 0.95 of MKL's time for the products of
# backbones on two threads of the x86 processors measured, 0.7 to 1.05 on one, but some 30 us to start; our gradient for
# it takes some 100 us more.
MIN_PRODUCTS = 2**21
MIN_TRAINED_PRODUCTS = 2**24
HAS_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def _onednn_knows(*tensors: torch.Tensor | None) -> bool:
    for t in tensors:
        if t is not None and not (t.dtype == torch.float32 and t.is_cpu):
            return False
    return _get_mkldnn_enabled() and not (_is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"))


def onednn_infers(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether a layer may be oneDNN's own, which knows no gradient: float32 on an x86 CPU that only infers."""
    return HAS_ONEDNN and eager_inference(x, *weights) and _onednn_knows(x, *weights)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, least: int) -> bool:
    """Whether oneDNN takes a product: float32, large, on an x86 CPU, and watched by nothing but autograd."""
    if not (HAS_ONEDNN and unwatched() and _onednn_knows(x, weight, bias)):
        return False
    # Asked last: no graph may come to depend on a size.
    return x.numel() * weight.shape[0] >= least and x.is_contiguous() and weight.is_contiguous()


NO_ACT = "none", [], ""


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: tuple[str, list, str] = NO_ACT
) -> torch.Tensor:
    """act(x @ weight.t() + bias) in one operator of oneDNN's, where `onednn_infers`; the act by `onednn_act`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *act)


class _Linear(torch.autograd.Function):
    """oneDNN's product of (N, in_features) with gradients; MKL's in training adds to a map filled with the bias."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = None
        if wants_x:
            # oneDNN reads the weight across, at a price that many rows outweigh.
            if eager_inference(grad, weight) and grad.is_contiguous() and len(grad) >= 2 * max(weight.shape):
                dx = onednn_linear(grad, weight.t(), None)
            else:
                dx = grad @ weight
        return dx, grad.t() @ x if wants_weight else None, grad.sum(0) if wants_bias else None


@register_notrace_function  # asks for the size and type of its input
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`; large float32 products on an x86 CPU are oneDNN's.

    The two differ by the order of summation alone. `torch.backends.mkldnn.flags(enabled=False)` keeps to MKL.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features).
    """
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:
        trained = wants_gradient(x, weight, bias)
        if not _by_onednn(x, weight, bias, MIN_TRAINED_PRODUCTS if trained else MIN_PRODUCTS):
            return F.linear(x, weight, bias)
        if trained:
            # A map's shape is given back out here: autograd lets nothing write into views from inside of a function.
            return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))
        return onednn_linear(x, weight, bias)


@register_notrace_module  # asks whether a gradient needs the input
class InplaceGELU(nn.GELU):
    """GELU in the memory of its input: on a CPU, fresh memory for a wide map costs more than the function.

    An input that a gradient goes back to is kept.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            return F.gelu(x, approximate=self.approximate)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


# Activations that oneDNN applies to what it writes, by its names for them.
ONEDNN_ACTS = {nn.ReLU: "relu", nn.GELU: "gelu", InplaceGELU: "gelu"}


def onednn_act(act: nn.Module | None) -> tuple[str, list, str]:
    """The arguments by which oneDNN's operators know an activation of `ONEDNN_ACTS`, or none."""
    return NO_ACT if act is None else (ONEDNN_ACTS[type(act)], [], getattr(act, "approximate", ""))


def watched(*layers: nn.Module) -> bool:
    """Whether hooks see what goes through layers."""
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    return hooked or bool(nn.modules.module._has_any_global_hook())


@register_notrace_module  # asks for the size and type of its input
class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


@register_notrace_function  # asks for the size and type of its input
def linear_act(x: torch.Tensor, fc: nn.Linear, act: nn.Module) -> torch.Tensor:
    """act(fc(x)); where oneDNN computes the product, it writes it activated, unless hooks are to see both."""
    if type(fc) is Linear and type(act) in ONEDNN_ACTS:
        weight, bias = fc.weight, fc.bias
        inferred = not wants_gradient(x, weight, bias) and _by_onednn(x, weight, bias, MIN_PRODUCTS)
        if inferred and not watched(fc, act):
            return onednn_linear(x, weight, bias, onednn_act(act))
    return act(fc(x))
