"""What a method may look at while one block runs."""
from __future__ import annotations

import torch
from torch import nn

from ..kernels import attention_column_mean
from .blocks import QUERIES_AND_KEYS, VALUES, BlockAdapter
from .state import TokenState


class BlockContext:
    """One block at work: its tokens, and on demand its queries, keys, values and attention.

    Each image's n patch tokens follow P prefix tokens, which no method moves. What attention is made of, the methods
    below, covers all P + n; it is of the tokens that the attention of this block reads, `tokens` are those at hand:
    the block's input at "start", the sum with the attention's branch at "mid", the block's output at "end".

    Attributes:
        tokens: (B, P + n, C).
        state: a `TokenState`, of these tokens.
        index, depth: number of this block, from 0, and of all blocks.
        has_class: whether the first prefix token is a class token.
        out: (B, heads, P + n, d), what each head's attention gave; from "mid" on.
    """

    def __init__(
        self,
        adapter: BlockAdapter,
        block: nn.Module,
        index: int,
        depth: int,
        has_class: bool,
        tokens: torch.Tensor,
        state: TokenState,
        rope: torch.Tensor | None,
        key_bias: torch.Tensor | None,
    ):
        self.adapter, self.block = adapter, block
        self.index, self.depth = index, depth
        self.has_class = has_class
        self.tokens, self.state = tokens, state
        self.rope = rope
        self.bias = key_bias
        self.out: torch.Tensor | None = None
        self._normed: torch.Tensor | None = None
        self._projected: tuple[torch.Tensor, ...] | None = None
        self._turned: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def x(self) -> torch.Tensor:
        """The patch tokens at hand, (B, n, C)."""
        return self.tokens[:, self.state.prefix :]

    @property
    def n(self) -> int:
        return self.tokens.shape[1] - self.state.prefix

    @property
    def normed(self) -> torch.Tensor:
        """What the attention of this block reads, (B, P + n, C)."""
        if self._normed is None:
            self._normed = self.adapter.norm(self.block, self.tokens)
        return self._normed

    def projected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v (B, heads, P + n, d), after their norms and before any rotary embedding. k, v may have less heads."""
        if self._projected is None:
            self._projected = self.adapter.project(self.block, self.normed)
        return self._projected

    def look_ahead(self) -> None:
        """Projects to q and k alone: for a method at "start", as what it leaves of the tokens is projected anew."""
        self._projected = self.adapter.project(self.block, self.normed, QUERIES_AND_KEYS)

    def values(self) -> torch.Tensor:
        """v (B, heads, P + n, d), without q and k where nobody has asked for them."""
        if self._projected is None:
            return self.adapter.project(self.block, self.normed, VALUES)[0]
        return self._projected[2]

    def turned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k as their products make the attention: under the rotary embedding, if the model has one."""
        if self._turned is None:
            q, k = self.projected()[:2]
            if self.rope is not None:
                rope = _rope_at(self.rope, self.state.position)
                q, k = self.adapter.turn(self.block, q, rope), self.adapter.turn(self.block, k, rope)
            self._turned = q, k
        return self._turned

    def keys(self) -> torch.Tensor:
        """What most methods compare tokens by: the mean over heads of the keys of the patches, (B, n, d)."""
        return self.projected()[1][:, :, self.state.prefix :].mean(1)

    def cls_row(self) -> torch.Tensor:
        """The attention of the class token to the patches, (B, heads, n), at the cost of one query."""
        q, k = self.turned()
        return self._scores(q[:, :, :1], k).softmax(-1)[:, :, 0, self.state.prefix :]

    def column_mean(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The attention that each patch gets, (B, heads, n), no gradient: the mean over queries, or a sum by `weight`.

        Args:
            weight: (B, heads, P + n), of the queries; None for 1 / (P + n) each.
        """
        q, k = self.turned()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return attention_column_mean(q, k, key_bias=self.bias, weight=weight)[:, :, self.state.prefix :]

    def attention(self) -> torch.Tensor:
        """The whole attention matrix, (B, heads, P + n, P + n): for methods that cannot do without."""
        return self._scores(*self.turned()).softmax(-1)

    def apply(self, attention: torch.Tensor) -> torch.Tensor:
        """What an attention matrix of these tokens, (B, heads, P + n, P + n), gives: (B, heads, P + n, d)."""
        v = self.values()
        return attention.to(v.dtype) @ v.repeat_interleave(attention.shape[1] // v.shape[1], 1)

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        return scores if self.bias is None else scores + self.bias[:, None, None]

    def attend(self) -> torch.Tensor:
        """The block's own attention, fused where PyTorch has it so: (B, heads, P + n, d)."""
        q, k = self.turned()
        return self.adapter.attend(self.block, q, k, self.projected()[2], self.bias)


def _rope_at(rope: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    """Rotary embedding (N, D) or (heads, N, D) at positions (B, n): (B, 1 or heads, n, D)."""
    if position is None:
        return rope
    at = rope[..., position, :]  # (..., B, n, D)
    return at.unsqueeze(1) if rope.ndim == 2 else at.transpose(0, 1)
