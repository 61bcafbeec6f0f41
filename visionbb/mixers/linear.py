"""Linear layers by the faster of the two matrix products that PyTorch has on a CPU."""

import platform

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import nn

from ..kernels._dispatch import eager_inference

# PyTorch sends float32 to MKL. oneDNN, which it holds too, takes 0.7 to 0.9 of MKL's time for the products of backbones
# on the x86 processors measured (tools/results/linear_*_cpu.json), but some 30 us to start.
MIN_PRODUCTS = 2**25
HAS_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        HAS_ONEDNN
        and eager_inference(x, weight, bias)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= MIN_PRODUCTS
        and x.is_contiguous()
        and weight.is_contiguous()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@register_notrace_function  # asks for the size and type of its input
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`; large float32 products on an x86 CPU that only infers are oneDNN's.

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
    elif _by_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        return F.linear(x, weight, bias)


@register_notrace_module  # asks for the size and type of its input
class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
