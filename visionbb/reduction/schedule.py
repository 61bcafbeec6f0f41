"""How many tokens go in which block, and what is left to compute."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from .blocks import BlockAdapter
from .method import Method

Schedule = tuple[int | float, ...]  # an entry a block: tokens to remove, or (float) the share to keep


def removed(entry: int | float, n: int, limit: int) -> int:
    """Tokens that a block with this entry removes of n."""
    wanted = n - math.ceil(entry * n - 1e-6) if isinstance(entry, float) else entry
    return min(wanted, limit)


def reduces(entry: int | float) -> bool:
    """Whether a block with this entry is meant to remove any."""
    return entry < 1 if isinstance(entry, float) else entry > 0


def constant_r(r: int | tuple[int, float] | Sequence[int] | Mapping[int, int], method: Method, depth: int) -> Schedule:
    """The schedule of an `r` as `reduce_tokens` takes it."""
    blocks = list(method.blocks(depth))
    if isinstance(r, Sequence) and len(r) == 2 and isinstance(r[1], float):  # a list, too: files know no tuples
        mean, slope = r
        if not -1 <= slope <= 1:
            raise ValueError(f"r = (mean, slope) must have its slope in [-1, 1], got {slope}")
        steps = max(len(blocks) - 1, 1)
        r = {b: int(mean * (1 - slope + 2 * slope * i / steps)) for i, b in enumerate(blocks)}
    return _entries("r", r, blocks, depth, lambda v: type(v) is int and v >= 0, "ints of at least 0")


def keep_ratio(keep: float | Sequence[float] | Mapping[int, float], method: Method, depth: int) -> Schedule:
    """The schedule of a `keep` as `reduce_tokens` takes it."""
    blocks = list(method.blocks(depth))
    entries = _entries(
        "keep", keep, blocks, depth, lambda v: type(v) in (int, float) and 0 < v <= 1, "numbers in (0, 1]", rest=1.0
    )
    return tuple(map(float, entries))


def _entries(name: str, value, blocks: list[int], depth: int, fits: Callable, allowed: str, rest=0) -> Schedule:
    if isinstance(value, Mapping):
        if bad := [b for b in value if type(b) is not int or not 0 <= b < depth]:
            raise ValueError(f"{name} names blocks from 0 to {depth - 1}, got {bad[0]!r}")
        entries = [value.get(b, rest) for b in range(depth)]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != depth:
            raise ValueError(f"{name} as a list must have one entry for each of {depth} blocks, got {len(value)}")
        entries = list(value)
    else:
        entries = [value if b in blocks else rest for b in range(depth)]
    if bad := [v for v in entries if not fits(v)]:
        raise ValueError(f"{name} must be made of {allowed}, got {bad[0]!r}")
    return tuple(entries)


# ---- Multiply-adds --------------------------------------------------------------------------------------------------

class Cost(NamedTuple):
    """Multiply-adds of a column of equal blocks, in closed form.

    Attributes:
        attention, mlp: of one token in the linear layers of each block: 4 C^2 and 8 C^2 in a ViT of width C.
        pair: of a query and a key in each block: 2 C.
        patch: of one patch in the embedding.
        head: of the head; head_token: of each token in it, which only attention pooling reads.
        patches, prefix: tokens of the image, and those beside them.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    pair: tuple[int, ...]
    patch: int
    head: int
    head_token: int
    patches: int
    prefix: int

    @classmethod
    def of(cls, model: nn.Module, adapter: BlockAdapter, embedding: nn.Module, patches: int, prefix: int) -> Cost:
        """Raises ValueError where the embedding is no single convolution of patches."""
        convs = [module for module in embedding.modules() if isinstance(module, nn.Conv2d)]
        if len(convs) != 1:
            raise ValueError(f"the patch embedding must be one convolution for a closed form, got {len(convs)}")
        attention = [adapter.attention(block) for block in model.blocks]
        pool = getattr(model, "attn_pool", None)
        heads = [module for name, module in model.named_children() if name.startswith("head")]
        return cls(
            attention=tuple(map(_weights, attention)),
            mlp=tuple(_weights(block.mlp) for block in model.blocks),
            pair=tuple(2 * attn.num_heads * attn.head_dim for attn in attention),
            patch=_weights(convs[0]),
            head=sum(map(_weights, heads)) + (0 if pool is None else _weights(pool) - _weights(pool.kv)),
            head_token=0 if pool is None else _weights(pool.kv) + 2 * pool.num_heads * pool.head_dim,
            patches=patches,
            prefix=prefix,
        )

    def macs(self, counts: Sequence[tuple[int, int]], method: Method | None = None) -> int:
        """Of a pass whose blocks have these (tokens in attention, tokens in the MLP), prefix tokens not counted in.

        Args:
            method: what reduces them, with multiply-adds of its own; None to leave those out.
        """
        total = self.patch * self.patches + self.head
        before = self.patches
        for attention, mlp, pair, (n, n_mlp) in zip(self.attention, self.mlp, self.pair, counts, strict=True):
            if method is not None and n_mlp < before:
                total += method.step_macs(before, n_mlp, self.prefix, attention, pair)
            before = n_mlp
            n, n_mlp = n + self.prefix, n_mlp + self.prefix
            total += n * attention + n * n * pair + n_mlp * mlp
        return total + (before + self.prefix) * self.head_token


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim in (2, 4))


def counts(schedule: Schedule, method: Method, n: int) -> list[tuple[int, int]]:
    """(patch tokens in attention, patch tokens in the MLP) of each block, for n patches."""
    out = []
    for entry in schedule:
        left = n - removed(entry, n, method.limit(n))
        out.append((left if method.where == "start" else n, n if method.where == "end" else left))
        n = left
    return out


def budget(target_gmacs: float, cost: Cost, method: Method, depth: int) -> Schedule:
    """The schedule of the most multiply-adds that are no more than `target_gmacs` 1e9.

    One number is turned by bisection: r, of which the fraction is spread evenly over the blocks, or the share to keep.

    Raises:
        ValueError: the target is not below the plain model's, or out of reach.
    """
    blocks = list(method.blocks(depth))

    def schedule(effort: float) -> Schedule:
        if method.knob == "keep":
            return keep_ratio(1 - effort, method, depth)
        r = effort * cost.patches / 2
        return constant_r({b: int((i + 1) * r) - int(i * r) for i, b in enumerate(blocks)}, method, depth)

    def gmacs(effort: float) -> float:
        return cost.macs(counts(schedule(effort), method, cost.patches), method) / 1e9

    low, high = 0.0, 1 - 1 / cost.patches
    if not gmacs(high) <= target_gmacs < gmacs(low):
        raise ValueError(
            f"target_gmacs must lie below the {gmacs(low):.3f} of the plain model and from {gmacs(high):.3f} on, which"
            f" is the least that {type(method).__name__} reaches, got {target_gmacs}"
        )
    for _ in range(40):
        effort = (low + high) / 2
        low, high = (low, effort) if gmacs(effort) <= target_gmacs else (effort, high)
    return schedule(high)
