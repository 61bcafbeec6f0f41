"""Neighborhood attention in plain PyTorch: query tiles, each with the halo of keys that its windows touch.

A tile of T x T neighbouring queries (of one dilation group) sees at most (T+k-1) x (T+k-1) keys, so that gathering
those once and attending densely under a mask costs a small constant over the useful work, where a gather per query
moves every key k*k times and a mask over the map costs N x N. Windows that cover their group (k * dilation = length)
are the case of one tile a group with no masked key at all.

One `Plan` of index tables serves every geometry (dilation, ragged groups, stride, causal, disc), forward and backward.
The work is cut into chunks of images that stay in cache; peak extra memory does not grow with the batch.
"""
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .._dispatch import exporting
from .window import Window, axis_range

TILE = 8  # queries a side: 7 or 8 at the zoo's map sizes; smaller starves the matrix products, larger masks more
# Gathered keys and values of one chunk of images, in bytes. The backward calls more operators a chunk.
FORWARD_CHUNK, BACKWARD_CHUNK = 1 << 20, 4 << 20
LOG2E = math.log2(math.e)


class AxisTiles(NamedTuple):
    query: np.ndarray  # (tiles, T) positions; a ragged tile repeats its first query
    owner: np.ndarray  # (tiles, T) bool: False for the repeats
    key: np.ndarray  # (tiles, S) positions
    inside: np.ndarray  # (tiles, T, S) bool: does the query's window hold the key
    offset: np.ndarray  # (tiles, T, S) key - query, in-group


def _axis_tiles(length: int, window: Window, axis: int) -> AxisTiles:
    kernel, dilation, stride = window.kernel[axis], window.dilation[axis], window.stride[axis]
    start, count = axis_range(length, kernel, dilation, stride, window.causal[axis], window.disc)
    longest = -(-length // dilation)
    target = max(TILE, kernel // 2)
    tile = -(-longest // -(-longest // target))
    tile = min(-(-tile // stride) * stride, longest)  # whole stride groups share one window

    query, owner, low, high = [], [], [], []
    for group in range(min(dilation, length)):
        for first in range(group, length, tile * dilation):
            members = np.arange(first, min(first + tile * dilation, length), dilation)
            query.append(np.pad(members, (0, tile - len(members)), constant_values=members[0]))
            owner.append(np.arange(tile) < len(members))
            low.append(start[members].min())
            high.append((start + count)[members].max())
    query = np.stack(query)
    halo = max(np.subtract(high, low))
    step = np.array(low)[:, None] + np.arange(halo)  # in-group index of every key
    key = np.minimum(query[:, :1] % dilation + dilation * step, length - 1)  # past the end: masked, any will do
    step = step[:, None]
    inside = (step >= start[query][..., None]) & (step < (start + count)[query][..., None])
    return AxisTiles(query, np.stack(owner), key, inside, step - query[..., None] // dilation)


class Plan(NamedTuple):
    """Index tables of one geometry: n tiles of T queries and S keys (both flattened over the two axes)."""

    query: torch.Tensor | None  # (n*T,) flat position of every query slot; None: one tile, the map in its order
    key: torch.Tensor | None  # (n*S,) likewise
    slot: torch.Tensor | None  # (H*W,) the slot that owns each position
    spare: torch.Tensor | None  # (n*T,) slots that repeat a query of their tile; None: there are none
    pattern: torch.Tensor  # (p, T, S) index into [rpb, -inf] (rpb flattened)
    tile_pattern: torch.Tensor  # (n,) pattern of every tile; inner tiles share one
    dense: bool  # no key of any tile is masked
    n: int
    T: int
    S: int


def _patterns(tiles: AxisTiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (offset, inside) tables of an axis, and which of them each tile has."""
    outside = tiles.inside.size  # a value that no offset takes
    code, index = np.unique(np.where(tiles.inside, tiles.offset, outside), axis=0, return_inverse=True)
    return code, code != outside, index.reshape(-1)


@functools.lru_cache(maxsize=128)
def _tables(H: int, W: int, window: Window) -> dict[str, np.ndarray | bool | int | None]:
    """The fields of a `Plan` as NumPy arrays."""
    rows, cols = _axis_tiles(H, window, 0), _axis_tiles(W, window, 1)

    def grid(join, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(tiles_h, i) and (tiles_w, j) to (tiles_h * tiles_w, i * j)."""
        return join(a[:, None, :, None], b[None, :, None, :]).reshape(len(a) * len(b), -1)

    query = grid(np.add, rows.query * W, cols.query)
    key = grid(np.add, rows.key * W, cols.key)
    owner = grid(np.logical_and, rows.owner, cols.owner).reshape(-1)
    (n, T), S = query.shape, key.shape[1]
    slot = np.empty(H * W, dtype=np.int64)
    slot[query.reshape(-1)[owner]] = np.arange(n * T)[owner]

    dy, in_h, pattern_h = _patterns(rows)
    dx, in_w, pattern_w = _patterns(cols)
    dy, in_h = dy[:, None, :, None, :, None], in_h[:, None, :, None, :, None]
    dx, in_w = dx[None, :, None, :, None, :], in_w[None, :, None, :, None, :]
    inside = in_h & in_w
    if window.disc:
        inside = inside & (dy**2 + dx**2 < window.radius**2)
    kh, kw = window.kernel
    masked = (2 * kh - 1) * (2 * kw - 1)
    pattern = np.where(inside, (dy + kh - 1) * (2 * kw - 1) + dx + kw - 1, masked)

    whole = n == 1 and T == S == H * W  # the map is one tile: nothing to gather
    return dict(
        query=None if whole else query.reshape(-1),
        key=None if whole else key.reshape(-1),
        slot=None if whole else slot,
        spare=None if owner.all() else ~owner,
        pattern=pattern.reshape(-1, T, S),
        tile_pattern=(pattern_h[:, None] * pattern.shape[1] + pattern_w).reshape(-1),
        dense=bool(inside.all()),
        n=n, T=T, S=S,
    )


def _new_plan(H: int, W: int, window: Window, device: torch.device) -> Plan:
    fields = _tables(H, W, window)
    return Plan(**{k: torch.tensor(x, device=device) if isinstance(x, np.ndarray) else x for k, x in fields.items()})


_kept_plan = functools.lru_cache(maxsize=128)(_new_plan)


def _plan(H: int, W: int, window: Window, device: torch.device) -> Plan:
    # Tensors made while a graph is recorded belong to that graph: they must not reach the cache.
    return (_new_plan if exporting() else _kept_plan)(H, W, window, device)


def _take(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return x if index is None else x.index_select(1, index)


def _tiles(x: torch.Tensor, index: torch.Tensor | None, plan: Plan) -> torch.Tensor:
    """Gathers (B, N, ...) into (B * n, T or S, ...)."""
    return x if index is None else x.index_select(1, index).unflatten(1, (plan.n, -1)).flatten(0, 1)


def _untile(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(B * n, T, ...) back to (B, N, ...): every position from the slot that owns it."""
    return x if plan.slot is None else x.unflatten(0, (-1, plan.n)).flatten(1, 2).index_select(1, plan.slot)


def _bias(plan: Plan, rpb: torch.Tensor | None, window: Window, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask of every tile, (n, heads or 1, T, S): the position bias, -inf outside the windows."""
    if rpb is None:
        if plan.dense:
            return None
        kh, kw = window.kernel
        rpb = like.new_zeros(1, 2 * kh - 1, 2 * kw - 1)
    table = rpb.flatten(1).to(like.dtype)
    if not plan.dense:
        table = F.pad(table, (0, 1), value=float("-inf"))
    bias = table.index_select(1, plan.pattern.flatten()).unflatten(1, plan.pattern.shape)
    return (bias if plan.n == 1 else bias.index_select(1, plan.tile_pattern)).transpose(0, 1)


def _repeat(bias: torch.Tensor | None, times: int) -> torch.Tensor | None:
    return bias if bias is None or times == 1 or len(bias) == 1 else bias.repeat(times, 1, 1, 1)


def _chunks(B: int, plan: Plan, bytes_per_token: int, limit: int) -> list[slice]:
    step = B if plan.key is None else max(1, limit // (plan.n * plan.S * bytes_per_token))
    step = -(-B // -(-B // step)) if B else 1
    return [slice(i, min(i + step, B)) for i in range(0, B, step)]


def _attend(q, k, v, bias, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention on (B, heads, T, d); also its log-sum-exp (B, heads, T)."""
    if q.device.type == "cpu":  # the kernel behind F.scaled_dot_product_attention, which hides the log-sum-exp
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) * scale @ k.to(wide).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v.to(wide)).to(v.dtype), scores.logsumexp(-1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, window: Window, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without autograd: out like `v`, lse (B, H, W, heads)."""
    B, H, W, heads, d = q.shape
    plan = _plan(H, W, window, q.device)
    bias = _bias(plan, rpb, window, q)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    outs, lses = [], []
    for part in _chunks(B, plan, 2 * heads * d * q.element_size(), FORWARD_CHUNK):
        tiles = (_tiles(q[part], plan.query, plan), _tiles(k[part], plan.key, plan), _tiles(v[part], plan.key, plan))
        out, lse = _attend(*(t.transpose(1, 2) for t in tiles), _repeat(bias, len(q[part])), scale)
        outs.append(_untile(out.transpose(1, 2), plan))
        lses.append(_untile(lse.transpose(1, 2), plan))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
    return out.contiguous().view(B, H, W, heads, d), lse.contiguous().view(B, H, W, heads)


def exportable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    window: Window,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same as one graph of standard operators, for torch.export and ONNX; the batch may be dynamic."""
    H, W = q.shape[1:3]
    plan = _plan(H, W, window, q.device)
    bias = _bias(plan, rpb, window, q)
    # Tiles stand beside the heads here, not in the batch: the mask then broadcasts over a batch of unknown size.
    q, k, v = (
        _take(x.flatten(1, 2), index).unflatten(1, (plan.n, -1)).transpose(2, 3).flatten(1, 2)
        for x, index in ((q, plan.query), (k, plan.key), (v, plan.key))
    )
    if bias is not None:
        bias = bias.expand(-1, q.shape[1] // plan.n, -1, -1).flatten(0, 1)[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    def restored(x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(1, (plan.n, -1)).transpose(2, 3).flatten(1, 2)
        return _take(x, plan.slot).unflatten(1, (H, W))

    lse = None
    if return_lse:
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        lse = restored((scores if bias is None else scores + bias).logsumexp(-1))
    return restored(out), lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: Window,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> torch.Tensor | None:
    """Writes the gradients of q, k and v into dq, dk and dv (any strides) and returns that of rpb.

    The weights are recomputed from the log-sum-exp; dS = P * (dP - rowsum(dout * out) + dlse).
    """
    B, H, W, heads, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    plan = _plan(H, W, window, q.device)
    bias = _bias(plan, rpb, window, lse)
    if bias is not None:
        bias = bias * LOG2E
    delta = (dout.to(wide) * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    q, k, v, dout, delta, lse2 = (x.flatten(1, 2) for x in (q, k, v, dout, delta, lse * LOG2E))
    dbias = None if rpb is None else lse.new_zeros(heads, plan.n, plan.T * plan.S)

    for part in _chunks(B, plan, 2 * heads * d * q.element_size(), BACKWARD_CHUNK):
        images = len(q[part])
        tq, tdo, tdelta, tlse = (_tiles(x[part], plan.query, plan) for x in (q, dout, delta, lse2))
        tk, tv = (_tiles(x[part], plan.key, plan) for x in (k, v))
        tq, tdo, tk, tv = (x.to(wide) for x in (tq, tdo, tk, tv))
        if plan.spare is not None:  # a repeated query must not count twice: its weights become 2 ** -inf
            tlse = tlse.masked_fill(plan.spare.view(-1, plan.T, 1).repeat(images, 1, 1), float("inf"))
        gq, gk, gv = torch.empty_like(tq), torch.empty_like(tk), torch.empty_like(tv)
        for i in range(heads):  # views of one head are plain matrices with a row stride: no head-major copy
            qi, ki, vi, doi = (x[:, :, i] for x in (tq, tk, tv, tdo))
            minus_lse = -tlse[:, :, i, None]
            if bias is None:
                p = torch.baddbmm(minus_lse, qi, ki.transpose(1, 2), alpha=scale * LOG2E)
            else:
                start = bias[:, i if bias.shape[1] > 1 else 0] + minus_lse.unflatten(0, (images, plan.n))
                p = start.flatten(0, 1).baddbmm_(qi, ki.transpose(1, 2), alpha=scale * LOG2E)
            p = p.exp2_()  # not exp: that of -inf is several times slower on a CPU
            gv[:, :, i] = torch.bmm(p.transpose(1, 2), doi)
            ds = torch.bmm(doi, vi.transpose(1, 2)).sub_(tdelta[:, :, i, None]).mul_(p)
            gq[:, :, i] = torch.bmm(ds, ki)
            gk[:, :, i] = torch.bmm(ds.transpose(1, 2), qi)
            if dbias is not None:
                dbias[i] += ds.view(images, plan.n, -1).sum(0)
        dq[part] = _untile(gq.mul_(scale), plan).view(images, H, W, heads, d)
        for g, into in ((gk.mul_(scale), dk), (gv, dv)):
            g = g.unflatten(0, (images, plan.n)).flatten(1, 2)
            if plan.key is not None:
                g = g.new_zeros(images, H * W, heads, d).index_add_(1, plan.key, g)
            into[part] = g.view(images, H, W, heads, d)

    if dbias is None:
        return None
    by_pattern = dbias.new_zeros(heads, *plan.pattern.shape).flatten(2).index_add_(1, plan.tile_pattern, dbias)
    table = dbias.new_zeros(heads, rpb[0].numel() + 1)
    table.scatter_add_(1, plan.pattern.flatten().expand(heads, -1), by_pattern.flatten(1))
    return table[:, :-1].view_as(rpb)
