"""Rates for DiffRate under a budget, learned from a handful of images while the network's weights stand still."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import token_match
from .api import reduce_tokens, remove_reduction
from .context import BlockContext
from .method import Method
from .models import Reduced
from .report import cost_of
from .schedule import Cost, counts

STEEPNESS = 100.0  # of the budget in the loss: 5 (GMACs - target)^2 for DeiT-S in the paper


def calibrate(
    model: nn.Module, images: torch.Tensor, target_gmacs: float, *, steps: int = 50, lr: float = 0.1
) -> dict[str, list[int]]:
    """How many tokens each block drops and merges: options of "diffrate" that change the outputs little.

        reduce_tokens(model, "diffrate", **calibrate(model, images, target_gmacs=2.9))

    From the same number in all blocks but the first, half of it dropped, the numbers are learned with Adam: the loss is
    the cross-entropy with the plain model's outputs, for which no labels are needed, and the square of what the
    budget is missed by (DiffRate, arXiv 2305.17997). In the end they are scaled to meet it.

    The search makes whole attention matrices and keeps them for the gradients: memory as of a training step.

    Args:
        model: one that `reduce_tokens` takes, not reduced, with a class token and a classifier. It is left as it was.
        images: (B, in_chans, H, W), preprocessed; some tens are enough.
        target_gmacs: 1e9 multiply-adds an image of this size.
        steps: of learning, each with all images.
        lr: of the logits over numbers of tokens.

    Returns:
        "r" and "prune", an entry a block.

    Raises:
        TypeError, ValueError: as `reduce_tokens`; a reduced model.
        RuntimeError: rates that cannot be scaled to the budget.
    """
    if isinstance(model, Reduced):
        raise ValueError("model is reduced already; remove_reduction gives it back plain")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            wanted = model(images).softmax(-1)
        reduce_tokens(model, "diffrate", target_gmacs=target_gmacs, input_size=tuple(images.shape[-2:]))
        reducer = model.reducer
        method, grid = reducer.method, reducer.family.grid(model, tuple(images.shape[-2:]))
        cost, budget = cost_of(model, grid), target_gmacs * 1e9
        plain = cost.macs([(cost.patches, cost.patches)] * len(model.blocks))
        kept = [left for _, left in counts(reducer.schedule, method, cost.patches)]
        reducer.method = search = Search(kept, cost.patches).to(images.device)
        optimizer = torch.optim.Adam([search.logits], lr)
        for _ in range(steps):
            missed = (search.macs(cost) - budget) / plain
            loss = F.cross_entropy(model(images), wanted) + STEEPNESS * missed**2
            (search.logits.grad,) = torch.autograd.grad(loss, [search.logits])
            optimizer.step()
        removed, pruned = search.numbers()
        r = scaled(removed, method, cost, budget)
        return {"r": r, "prune": [n * p // max(m, 1) for n, m, p in zip(r, removed, pruned, strict=True)]}
    finally:
        remove_reduction(model)
        model.train(training)


def scaled(removed: list[int], method: Method, cost: Cost, budget: float) -> list[int]:
    """These numbers of tokens times the least factor that meets the budget in multiply-adds."""
    def times(factor: float) -> list[int]:
        return [int(factor * number) for number in removed]

    def fits(factor: float) -> bool:
        return cost.macs(counts(times(factor), method, cost.patches)) <= budget

    low, high = 0.0, float(cost.patches)
    if not fits(high):
        raise RuntimeError(f"tokens removed, {removed} a block, do not meet the budget at any scale: take another lr")
    for _ in range(40):
        factor = (low + high) / 2
        low, high = (low, factor) if fits(factor) else (factor, high)
    return times(high)


class Search(Method):
    """DiffRate with numbers that gradients reach: tokens that went are still there, but get no attention.

    For each block and for both of its steps, pruning (0) and merging (1), there is a distribution over how many tokens
    are left. Its mean, rounded up, is the number that counts; a token of rank j stays with the probability of all
    numbers above j, as far as gradients are concerned (straight through).

    Args:
        kept: the numbers of tokens left behind each block to begin with.
        patches: tokens of an image.
    """

    adaptive = True

    def __init__(self, kept: list[int], patches: int):
        super().__init__()
        before = [patches, *kept[:-1]]
        start = torch.tensor([((n + m) / 2, m) for n, m in zip(before, kept, strict=True)])
        self.register_buffer("numbers_left", torch.arange(1, patches + 1.0))
        width = max(patches / 16, 1.0)
        self.logits = nn.Parameter(-((self.numbers_left - start[..., None]) / width).square())  # (depth, 2, patches)

    def blocks(self, depth: int) -> range:
        return range(1, depth)

    def left(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens left behind both steps of each block, never more than before; the first block keeps all."""
        mean = (self.logits.softmax(-1) * self.numbers_left).sum(-1)
        whole = mean + (mean.ceil() - mean).detach()
        at = self.numbers_left[-1]
        left = [(at, at)]
        for pruning, merging in whole[1:]:
            behind_pruning = torch.minimum(at, pruning)
            at = torch.minimum(behind_pruning, merging)
            left.append((behind_pruning, at))
        return left

    def numbers(self) -> tuple[list[int], list[int]]:
        """Tokens that each block removes, and how many of them it prunes."""
        removed, pruned = [], []
        at = len(self.numbers_left)
        for behind_pruning, behind in self.left():
            removed.append(at - int(behind))
            pruned.append(at - int(behind_pruning))
            at = int(behind)
        return removed, pruned

    def macs(self, cost: Cost) -> torch.Tensor:
        behind = [at for _, at in self.left()]
        return cost.macs(list(zip([self.numbers_left[-1], *behind[:-1]], behind, strict=True)))

    def key_bias(self, size: torch.Tensor) -> None:
        """None: `attend` weighs keys by size itself, and masks them."""

    def attend(self, ctx: BlockContext) -> torch.Tensor:
        prefix, record = ctx.state.prefix, ctx.state.record
        ones = ctx.x.new_ones(ctx.x.shape[:2])
        alive, size = record[:2] if record else (ones, ones)
        weight = torch.cat((ones.new_ones(len(ones), prefix), alive * size), 1)
        attention = ctx.attention() * weight[:, None, None]
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-6)
        ctx.state = ctx.state._replace(record=(alive, size, attention[:, :, 0, prefix:].mean(1).detach()))
        return ctx.apply(attention)

    def reduce(self, ctx: BlockContext, remove: int) -> None:
        alive, size, score = ctx.state.record
        x, n = ctx.x, ctx.n
        rank = score.argsort(dim=1, descending=True).argsort(1)
        stays = []
        for logits, left in zip(self.logits[ctx.index], self.left()[ctx.index], strict=True):
            above = self.numbers_left[:, None] > torch.arange(n, device=x.device)
            probability = (logits.softmax(0)[:, None] * above).sum(0)[rank]
            stays.append((rank < left).to(x.dtype) + probability - probability.detach())
        unpruned = alive * stays[0]
        alive = unpruned * stays[1]
        _, target = token_match(x, x, dst_mask=alive > 0.5)
        into = F.one_hot(target, n).mT * (unpruned - alive)[:, None]  # (B, destinations, sources)
        merged = (x + into @ x) / (1 + into.sum(-1, keepdim=True))
        size = size + (into @ size[..., None])[..., 0]
        ctx.tokens = torch.cat((ctx.tokens[:, : ctx.state.prefix], merged), 1)
        ctx.state = ctx.state._replace(size=(alive * size).detach(), record=(alive, size, score))  # a size for the head
