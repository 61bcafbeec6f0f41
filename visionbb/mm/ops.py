"""Stand-in for `mmcv._ext`, mmcv's compiled ops: what detection heads need, from torchvision, on CPU and CUDA.

Names, arguments and results are those of the compiled extension, which writes into tensors that the caller allocated;
`mmcv.ops` stays as it is on top. An op that is not here raises an error that names the command to compile mmcv.
"""
from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import mmcv
import torch
import torchvision
from torch import Tensor


def _compile_command() -> str:
    try:
        package = f"onedl-mmcv=={version('onedl-mmcv')}"
    except PackageNotFoundError:  # the original, whose version without ops is a package of another name
        package = f"mmcv=={mmcv.__version__}"
    return (
        "pip install 'setuptools>=80,<82' wheel ninja psutil\n"
        f"    pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall {package}"
    )


COMPILE = _compile_command()


def __getattr__(name: str) -> Callable:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv was installed without its compiled ops, and visionbb.mm has no stand-in for {name!r}. "
            f"Compile mmcv against your torch:\n    {COMPILE}"
        )

    return missing


def get_compiler_version() -> str:
    return f"none (torchvision {torchvision.__version__})"


def get_compiling_cuda_version() -> str:
    return torch.version.cuda or "not available"


# ---- Non-maximum suppression ----------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that no better one overlaps, best first; sides are x2 - x1 + offset."""
    boxes = _at_least_single(boxes) + boxes.new_tensor([0, 0, offset, offset])
    # The compiled op sorts without regard to stability, torchvision stably: only this order settles ties as it does.
    order = scores.sort(dim=0, descending=True).indices
    ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    return order[torchvision.ops.nms(boxes[order], ranks, _as_float32(iou_threshold))]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (https://arxiv.org/abs/1704.04503): overlap lowers scores; below `min_score` a box goes.

    Takes boxes (N, 4), scores (N,); writes boxes and scores into the first rows of dets (N, 5), best first, and returns
    their indices. `method`: 0 drops overlapping boxes, 1 lowers linearly, 2 by a Gaussian of width `sigma`.
    """
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    index = torch.arange(len(boxes))
    scores = scores.clone()
    kept = []
    while len(index):
        best = int(scores[index].argmax())
        i = int(index[best])
        dets[len(kept), :4], dets[len(kept), 4] = boxes[i], scores[i]
        kept.append(i)
        index[best] = index[0]  # the compiled op swaps places, which decides between equal scores
        index = index[1:]
        low, high = torch.max(boxes[i, :2], boxes[index, :2]), torch.min(boxes[i, 2:], boxes[index, 2:])
        inter = (high - low + offset).clamp(min=0).prod(1)
        iou = inter / (areas[i] + areas[index] - inter)
        if method == 2:
            factor = torch.exp(-(iou * iou) / sigma)
        else:
            factor = torch.where(iou >= _as_float32(iou_threshold), 1 - iou if method == 1 else 0.0, 1.0)
        scores[index] *= factor
        index = _fill_gaps(index, scores[index] < _as_float32(min_score))
    return torch.tensor(kept, dtype=torch.long)


def _fill_gaps(index: Tensor, dropped: Tensor) -> Tensor:
    """What is left of `index`, each gap filled by the last one that stays, as the compiled op does it."""
    stays = int((~dropped).sum())
    out = index[:stays].clone()
    out[dropped[:stays]] = index[stays:][~dropped[stays:]].flip(0)
    return out


def _as_float32(value: float) -> float:
    """The compiled op takes thresholds in single precision."""
    return torch.tensor(value, dtype=torch.float32).item()


# ---- RoIAlign -------------------------------------------------------------------------------------------------------


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (https://arxiv.org/abs/1703.06870) of input (B, C, H, W) at rois (N, 5), into output (N, C, h, w)."""
    _require_average(pool_mode)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    _require_average(pool_mode)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
        )
    )


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        __getattr__("roi_align with pool_mode='max'")()


# ---- Focal loss (https://arxiv.org/abs/1708.02002) ------------------------------------------------------------------
# The compiled extension has these for CUDA alone. Logits (N, C), target (N,) class indices, where C says background;
# `weight` (C,) or empty. Backward gives the loss's derivative by the logits, for the caller to scale.


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Loss of every class on its own, (N, C)."""
    p, log_p, log_q, positive = _sigmoid_terms(input, target)
    loss = torch.where(positive, -alpha * (1 - p) ** gamma * log_p, -(1 - alpha) * p**gamma * log_q)
    output.copy_(_weigh(loss, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    p, log_p, log_q, positive = _sigmoid_terms(input, target)
    grad = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_q - p),
    )
    grad_input.copy_(_weigh(grad, target, weight))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Loss (N,) of the target's class; `input` holds probabilities, and a negative target counts nothing."""
    p = _target_probability(input, target)
    loss = -alpha * (1 - p) ** gamma * _log(p)
    output.copy_(_weigh(loss, target, weight))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    p = _target_probability(input, target)
    slope = alpha * (gamma * (1 - p) ** (gamma - 1) * p * _log(p) - (1 - p) ** gamma)
    buff.copy_(_weigh(slope, target, weight))
    hot = (target[:, None] == torch.arange(input.shape[1], device=input.device)).to(input.dtype)
    grad_input.copy_(buff[:, None] * (hot - input))


def _sigmoid_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, log p, log(1 - p), and which entries are those of their row's class."""
    p = _at_least_single(input).sigmoid()
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return p, _log(p), _log(1 - p), positive


def _target_probability(probabilities: Tensor, target: Tensor) -> Tensor:
    return _at_least_single(probabilities).gather(1, target.clamp(min=0)[:, None])[:, 0].where(target >= 0, 1.0)


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log(p: Tensor) -> Tensor:
    """log p, finite at 0 by the smallest normal float32, as the compiled op has it."""
    return p.clamp(min=torch.finfo(torch.float32).tiny).log()


def _weigh(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Times the weight of the target's class; targets that are no class weigh nothing."""
    if not weight.numel():
        return values
    padded = torch.cat((weight, weight.new_zeros(1)))
    of_row = padded[target.where((target >= 0) & (target < len(weight)), len(weight))]
    return values * of_row.reshape(-1, *(1,) * (values.ndim - 1))
