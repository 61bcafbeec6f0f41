"""What a network looks at: the attention that is hidden in its scans.

Paper: The Hidden Attention of Mamba Models (Ali, Zimerman and Wolf), https://arxiv.org/abs/2403.01590

With its time steps, B and C given, a selective scan is linear in its tokens: y = alpha u + D u with

    alpha_ij = C_i . (exp(dt_{j+1} A) ... exp(dt_i A)) (dt_j B_j),    j before i along the route,

one matrix a channel, which plays the part of an attention head's.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import kernels  # noqa: F401  (registers the operators)

VALUES = 1 << 24  # of the results of the impulses that are sent through a scan at once


@torch.no_grad()
def hidden_attention(
    model: nn.Module, images: Tensor, modules: Sequence[str] = ("",), mean: bool = True
) -> dict[str, Tensor]:
    """The matrices alpha of a model's selective scans, at a cost quadratic in the number of tokens.

    They are found where the operators `visionbb.kernels.ss2d` and `selective_scan` run, so in any model that has them:
    column j of a matrix is what the scan makes of a unit impulse at token j.

    Args:
        model: in the mode that it is to be looked at in, mostly `eval()`.
        images: (B, in_chans, H, W).
        modules: the names of modules, as in `model.named_modules()`, whose scans are wanted; "" is the whole model.
        mean: over the channels, as the paper shows them.

    Returns:
        By the name of the module that scans, (B, routes, L, L), or (B, routes, channels, L, L) without `mean`: a row a
        result, a column a token. Tokens stand as the operator gets them. For `SS2D` that is row by row, whatever the
        route; for an `S6`, of a map row by row, with Vim's class token behind L // 2 others, and in LocalVim along the
        route. Windows (MambaVision's) count as images.

    Raises:
        ValueError: a name that the model does not have, or no scan in those modules.
    """
    known = dict(model.named_modules())
    if missing := [name for name in modules if name not in known]:
        raise ValueError(f"modules must be names of modules of the model, got {missing[0]!r}")
    wanted = {id(module) for name in modules for module in known[name].modules()}
    recorder = _Recorder()
    with ExitStack() as stack:
        for name, module in known.items():
            enter = recorder.enter(name if id(module) in wanted else None)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
        stack.enter_context(recorder)
        model(images)
    if not recorder.scans:
        raise ValueError(f"no scan ran in the modules {', '.join(map(repr, modules))} of {type(model).__name__}")
    return {
        name: torch.cat([_matrices(scan, args, mean) for scan, args in calls], 1)
        for name, calls in recorder.scans.items()
    }


def row_as_map(alpha: Tensor, token: int | None = None) -> Tensor:
    """What the result at one token is made of, as a map (B, side, side): |alpha| in its row, of all routes together.

    Args:
        alpha: (B, routes, L, L), of a square map of tokens, or of one with a class token behind half of them (Vim).
        token: the row; by default the class token's, or else that of the token in the middle.

    Raises:
        ValueError: another L, or no such token.
    """
    L = alpha.shape[-1]
    side = math.isqrt(L)
    middle = side**2 // 2
    if L - side**2 > 1:
        raise ValueError(f"alpha must be of a square map, with or without a class token, got {L} tokens")
    if token is not None and not 0 <= token < L:
        raise ValueError(f"token must be within 0 and {L - 1}, got {token}")
    row = alpha[:, :, middle if token is None else token].abs().sum(1)
    if side**2 < L:
        row = torch.cat((row[:, :middle], row[:, middle + 1 :]), 1)
    return row.unflatten(1, (side, side))


class _Recorder(TorchDispatchMode):
    """The calls of scans, by the innermost module that runs; those of modules without a name are left out."""

    def __init__(self):
        super().__init__()
        self.running: list[str | None] = [None]
        self.scans: dict[str, list[tuple[Callable[..., Tensor], tuple]]] = {}

    def enter(self, name: str | None) -> Callable[..., None]:
        return lambda *_: self.running.append(name)

    def leave(self, *_) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = self.running[-1]
        if name is not None and func in _SCANS:
            self.scans.setdefault(name, []).append((_SCANS[func], args))
        return func(*args, **(kwargs or {}))


def _selective_scan(impulses: Tensor, i: int, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse) -> Tensor:
    """The scan of image i with impulses (n, L) in place of u, for all channels: (n, L, 1, channels)."""
    delta, B, C = (t[i].expand(len(impulses), *t.shape[1:]) for t in (delta, B, C))
    u = impulses[:, :, None].expand_as(delta)
    y, _ = torch.ops.visionbb.selective_scan(u, delta, A, B, C, None, delta_bias, delta_softplus, reverse)
    return y.unsqueeze(2)


def _ss2d(impulses: Tensor, i: int, x, proj, dt_weight, dt_bias, A, D, routes, merge, permute) -> Tensor:
    """The scans of image i with impulses (n, L) in place of x, for all channels: (n, L, routes, channels)."""
    x = impulses[:, :, None].expand(-1, -1, x.shape[-1])
    proj = proj[i].flatten(0, -2).expand(len(impulses), -1, -1)
    apart = merge != "scatter"  # routes that share out the tokens give one result each
    y = torch.ops.visionbb.ss2d(x, proj, dt_weight, dt_bias, A, None, routes, "stack" if apart else merge, permute)
    return y if apart else y.unsqueeze(2)


_SCANS = {
    torch.ops.visionbb.selective_scan.default: _selective_scan,
    torch.ops.visionbb.ss2d.default: _ss2d,
}


def _matrices(scan: Callable[..., Tensor], args: tuple, mean: bool) -> Tensor:
    """Of all images: (B, routes, L, L), or (B, routes, channels, L, L)."""
    x = args[0].flatten(1, -2)
    B, L, channels = x.shape
    routes = len(args[6]) if scan is _ss2d else 1
    unit = torch.eye(L, dtype=x.dtype, device=x.device)
    matrices = []
    for i in range(B):
        columns = [scan(impulses, i, *args) for impulses in unit.split(max(1, VALUES // (L * routes * channels)))]
        matrices.append(torch.cat([y.mean(-1, keepdim=True) if mean else y for y in columns]))
    found = torch.stack(matrices).permute(0, 3, 4, 2, 1)
    return found.squeeze(2) if mean else found
