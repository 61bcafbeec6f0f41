"""The protocol of reduction methods: score, match, fuse."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import token_merge
from .context import BlockContext
from .matching import keep_marked
from .state import Assignment, behind_prefix, gather_tokens

METHODS: dict[str, type[Method]] = {}  # by the names that `reduce_tokens` takes
WHERE = ("start", "mid", "end")


class Method(nn.Module):
    """One way to have fewer tokens: a subclass says which go where (`match`) and what becomes of those (`fuse`).

    A method has no state of its own: what one block leaves for the next, or for the loss, it adds to the record,
    `ctx.state = ctx.state._replace(record=(...))`; a loss finds it in what `model.forward_with_state(images)` returns.
    Parameters are made in `build`; they become the model's, as `reducer.method.*`.

    To add one, write visionbb/reduction/<name>.py with a class

        class Name(Method, name="name"):

    and import it in visionbb/reduction/__init__.py. Constructor arguments are the options of `reduce_tokens`.

    Attributes:
        where: "start": in front of a block's attention, which then reads the reduced tokens; "mid": between attention
            and MLP; "end": behind the block. Queries, keys and attention of the context are those of the block itself.
        knob: what `target_gmacs` turns: "r", tokens removed a block, or "keep", the share that a block keeps.
        needs_class_token: whether it reads the class token; models without one are refused.
        elsewhere: whether a schedule may name other blocks than `blocks`.
        adaptive: whether it finds the number of tokens itself; then it takes no r, keep or target_gmacs.
    """

    where = "mid"
    knob = "r"
    needs_class_token = False
    elsewhere = True
    adaptive = False

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            METHODS[name] = cls

    def build(self, depth: int, dim: int, num_heads: int) -> None:
        """Makes the parameters, for a model of this many blocks and this width; called once, by `reduce_tokens`."""

    def blocks(self, depth: int) -> range | tuple[int, ...]:
        """The blocks that reduce, unless the schedule names them."""
        return range(depth)

    def limit(self, n: int) -> int:
        """How many of n tokens one step can remove at most."""
        return n // 2

    def step_macs(self, n: int, left: int, prefix: int, attention: int, pair: int) -> int:
        """Multiply-adds that a step from n to `left` patch tokens adds to those of its block.

        Matching and merging, a per cent of a block at most, are not counted.

        Args:
            prefix, attention, pair: of the block, as in `schedule.Cost`.
        """
        return 0

    def key_bias(self, size: torch.Tensor) -> torch.Tensor | None:
        """(B, n), added to the attention scores of merged tokens: their log-size, as if each were still that many.

        ToMe's proportional attention (arXiv 2210.09461, equation 1); padding, of size 0, gets no attention.
        """
        return size.log()

    def attend(self, ctx: BlockContext) -> torch.Tensor:
        """The attention of a block, (B, heads, P + n, d): the block's own, unless a method needs another."""
        return ctx.attend()

    def reduce(self, ctx: BlockContext, remove: int) -> tuple[Assignment, torch.Tensor, torch.Tensor | None] | None:
        """One step: where the n patch tokens go, all tokens (B, P + n', C) that stay, and the sizes (B, n') of patches.

        Sizes are None for a method that merges none. None leaves all tokens as they are: for an adaptive method, whose
        `remove` is 0, and for one that masks them in training.
        """
        assignment = self.match(ctx, remove)
        return assignment, *self.fuse(ctx, assignment)

    def match(self, ctx: BlockContext, remove: int) -> Assignment:
        """Which `remove` of the ctx.n patch tokens go, and where to."""
        raise NotImplementedError

    def fuse(self, ctx: BlockContext, assignment: Assignment) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens that stay, those of the prefix first, and the sizes of patch tokens; here: means by size."""
        return merge_mean(ctx, assignment)


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks 3, 6 and 9 of 12, and those at a quarter, half and three quarters of other depths; never the first."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4} - {0}))


def merge_mean(
    ctx: BlockContext, assignment: Assignment, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, P + n', C) that are the means of those that go into them, and the sums of their sizes (B, n').

    Args:
        weight: (B, n), of the means; None for the sizes.
    """
    prefix, size = ctx.state.prefix, ctx.state.size
    by = size if weight is None else weight
    # of all tokens, each of the prefix into itself: their copies, without and again with the prefix, are spared
    index, left = behind_prefix(assignment.index, prefix), prefix + assignment.place.shape[1]
    tokens, total = token_merge(ctx.tokens, index, left, None if by is None else F.pad(by, (prefix, 0), value=1.0))
    return tokens, total[:, prefix:] if weight is None else merge_sizes(size, assignment)


def merge_sizes(size: torch.Tensor | None, assignment: Assignment) -> torch.Tensor:
    """The sums (B, n') of the sizes (B, n), None for ones, of the tokens that go into each."""
    index = assignment.index
    ones = torch.ones(index.shape, device=index.device)
    return token_merge(ones[..., None], index, assignment.place.shape[1], size)[1]


def keep_tokens(ctx: BlockContext, assignment: Assignment) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that stay, (B, P + n', C), as they are, and the sizes of patch tokens."""
    size, place = ctx.state.size, assignment.place
    tokens = gather_tokens(ctx.tokens, behind_prefix(place, ctx.state.prefix))
    return tokens, None if size is None else size.gather(1, place)


def keep_padded(ctx: BlockContext, stays: torch.Tensor) -> tuple[Assignment, torch.Tensor, torch.Tensor]:
    """The whole step of a method that keeps the tokens marked (B, n): what fills up images that keep fewer has size 0.

    For methods that merge nothing: all other sizes are 1.
    """
    assignment = keep_marked(stays)
    return assignment, keep_tokens(ctx, assignment)[0], stays.gather(1, assignment.place).float()
