"""Neighborhood attention in plain PyTorch: query tiles, each with the halo of keys that its windows touch.

A tile of neighbouring queries of one dilation group sees few keys more than one query does, so that copying those once
and attending densely under a mask costs a small constant over the useful work, where a gather per query moves every
key k*k times and a mask over the map costs N x N. Where windows cover their group (kernel * dilation = length), a
tile is a group and nothing is masked.

Dilation groups of one length share all tables; a map has at most two lengths an axis, so that a plan has one to four
parts. Tiles start at few distinct steps, so that strided views copy them without index tables. The work goes in chunks
of images that stay in cache: peak extra memory does not grow with the batch.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .._dispatch import exporting
from .window import Window, axis_range

# Gathered keys and values of one chunk of images, in bytes. The backward calls more operators a chunk.
FORWARD_CHUNK, BACKWARD_CHUNK = 1 << 20, 4 << 20
TILE_SIDES = range(4, 17)
LOG2E = math.log2(math.e)


# ---- Plans: which tiles a geometry has ------------------------------------------------------------------------------

class Axis(NamedTuple):
    """Tiles along one axis, the same for `groups` dilation groups of equal length.

    Starts count inside a group: index i of group g stands at position g + dilation * i.
    """

    first: int  # first group
    groups: int
    dilation: int
    query: tuple[int, ...]  # start of each tile; the last one may overlap the one before
    key: tuple[int, ...]  # start of each tile's halo
    T: int  # queries a tile
    S: int  # keys a tile
    inside: np.ndarray  # (tiles, T, S) bool: does the query's window hold the key
    offset: np.ndarray  # (tiles, T, S) key - query

    def positions(self, starts: tuple[int, ...], size: int) -> np.ndarray:
        """(groups * tiles, size) positions on the map."""
        group = np.arange(self.first, self.first + self.groups)[:, None, None]
        return (group + self.dilation * (np.array(starts)[:, None] + np.arange(size))).reshape(-1, size)

    def owner(self) -> np.ndarray:
        """(groups * tiles, T) bool: of a query that stands in two tiles, the later one owns it."""
        after = np.append(self.query[1:], self.query[-1] + self.T)
        own = np.array(self.query)[:, None] + np.arange(self.T) < after[:, None]
        return np.tile(own, (self.groups, 1))


def _axis(first: int, groups: int, length: int, tile: int, window: Window, axis: int) -> Axis:
    start, count = axis_range(length, window.kernel[axis], 1, window.stride[axis], window.causal[axis], window.disc)
    query = [min(q, length - tile) for q in range(0, length, tile)]
    members = np.array(query)[:, None] + np.arange(tile)
    low, high = start[members].min(1), (start + count)[members].max(1)
    halo = (high - low).max()
    low = np.minimum(low, length - halo)
    key = low[:, None, None] + np.arange(halo)
    begin = start[members][..., None]
    inside = (key >= begin) & (key < begin + count[members][..., None])
    offset = key - members[..., None]
    return Axis(
        first, groups, window.dilation[axis], tuple(query), tuple(low.tolist()), tile, int(halo), inside, offset
    )


def _candidates(length: int, window: Window, axis: int) -> list[list[Axis]]:
    """For each length of the axis's dilation groups, tilings of several tile sides."""
    dilation = window.dilation[axis]
    short, longer = divmod(length, dilation)  # `longer` groups have one member more
    lengths = [(0, longer, short + 1), (longer, dilation - longer, short)]
    return [
        [_axis(first, groups, size, side, window, axis) for side in {-(-size // -(-size // t)) for t in TILE_SIDES}]
        for first, groups, size in lengths
        if groups and size
    ]


def _cost(rows: Axis, cols: Axis) -> float:
    """Rough time of a tiling, ns a head, from measurements on two x86 cores: scores, copies, calls."""
    T, S = rows.T * cols.T, rows.S * cols.S
    return rows.groups * len(rows.query) * cols.groups * len(cols.query) * (2.9 * T * S + 32 * (T + S) + 3000)


class Part(NamedTuple):
    """Some of the tiles of a map, n of them with T queries and S keys each (flattened over the two axes)."""

    rows: Axis
    cols: Axis
    n: int
    T: int
    S: int
    whole: bool  # one tile that is the map: nothing to copy
    dense: bool  # no key of any tile is masked
    pattern: torch.Tensor  # (p, T, S) index into [rpb, -inf] (rpb flattened)
    tile_pattern: torch.Tensor | None  # (n,) pattern of every tile; None: all have the first
    spare: torch.Tensor | None  # (n, T) queries that a later tile owns; None: there are none
    query: torch.Tensor  # (n*T,) flat position of every query
    key: torch.Tensor  # (n*S,) likewise


def _patterns(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """The distinct offset tables of an axis, outside pairs marked, and which of them each tile has."""
    outside = 1 << 30  # no offset
    codes, index = np.unique(np.where(axis.inside, axis.offset, outside), axis=0, return_inverse=True)
    return codes, np.tile(index.reshape(-1), axis.groups)


@functools.lru_cache(maxsize=128)
def _tables(H: int, W: int, window: Window) -> list[dict]:
    """The parts of a map, as `Part`'s fields with NumPy arrays."""
    kh, kw = window.kernel
    parts = []
    for row_choice in _candidates(H, window, 0):
        for col_choice in _candidates(W, window, 1):
            rows, cols = min(((r, c) for r in row_choice for c in col_choice), key=lambda pair: _cost(*pair))

            def grid(join, a: np.ndarray, b: np.ndarray) -> np.ndarray:
                """(row tiles, i) and (column tiles, j) to (n, i * j)."""
                return join(a[:, None, :, None], b[None, :, None, :]).reshape(len(a) * len(b), -1)

            (dy, pattern_h), (dx, pattern_w) = _patterns(rows), _patterns(cols)
            dy, dx = dy[:, None, :, None, :, None], dx[None, :, None, :, None, :]
            inside = np.maximum(dy, dx) < 1 << 30
            if window.disc:
                inside &= dy**2 + dx**2 < window.radius**2
            pattern = np.where(inside, (dy + kh - 1) * (2 * kw - 1) + dx + kw - 1, (2 * kh - 1) * (2 * kw - 1))
            query = grid(np.add, rows.positions(rows.query, rows.T) * W, cols.positions(cols.query, cols.T))
            key = grid(np.add, rows.positions(rows.key, rows.S) * W, cols.positions(cols.key, cols.S))
            owner = grid(np.logical_and, rows.owner(), cols.owner())
            (n, T), S = query.shape, key.shape[1]
            several = inside.shape[0] * inside.shape[1] > 1
            tile_pattern = (pattern_h[:, None] * inside.shape[1] + pattern_w).reshape(-1)
            parts.append(dict(
                rows=rows, cols=cols, n=n, T=T, S=S,
                whole=n == 1 and T == S == H * W,
                dense=bool(inside.all()),
                pattern=pattern.reshape(-1, T, S),
                tile_pattern=tile_pattern if several else None,
                spare=None if owner.all() else ~owner,
                query=query.reshape(-1), key=key.reshape(-1),
            ))
    return parts


def _slots(H: int, W: int, window: Window) -> np.ndarray:
    """(H*W,) for every position a query slot that holds it, counted through the tiles of all parts."""
    slots = np.empty(H * W, dtype=np.int64)
    held = np.concatenate([fields["query"] for fields in _tables(H, W, window)])
    slots[held] = np.arange(len(held))
    return slots


def _new_plan(H: int, W: int, window: Window, device: torch.device) -> list[Part]:
    def tensor(value):
        return torch.tensor(value, device=device) if isinstance(value, np.ndarray) else value

    return [Part(**{name: tensor(value) for name, value in fields.items()}) for fields in _tables(H, W, window)]


_kept_plan = functools.lru_cache(maxsize=128)(_new_plan)


def _plan(H: int, W: int, window: Window, device: torch.device) -> list[Part]:
    # Tensors made while a graph is recorded belong to that graph: they must not reach the cache.
    return (_new_plan if exporting() else _kept_plan)(H, W, window, device)


# ---- Moving tiles ---------------------------------------------------------------------------------------------------

def _runs(starts: tuple[int, ...], step: int | None = None) -> list[tuple[slice, int, int]]:
    """Splits tiles into runs of evenly spaced starts (apart by `step`, if given): (tiles, first start, spacing)."""
    runs, low = [], 0
    while low < len(starts):
        high = low + 1
        spacing = starts[high] - starts[low] if high < len(starts) else 0
        if step is None or spacing == step:
            while high < len(starts) and starts[high] - starts[high - 1] == spacing:
                high += 1
        runs.append((slice(low, high), starts[low], spacing))
        low = high
    return runs


def _views(x: torch.Tensor, part: Part, keys: bool) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Strided views of x (B, H, W, ...) that together are all tiles: (row tiles, column tiles, view).

    A view is (B, groups, row tiles, groups, column tiles, side, side, ...). Query tiles of one view do not overlap.
    """
    (rows, cols), (sb, sh, sw, *rest) = (part.rows, part.cols), x.stride()
    h, w = (rows.S, cols.S) if keys else (rows.T, cols.T)
    dh, dw = rows.dilation * sh, cols.dilation * sw
    origin = x.storage_offset() + rows.first * sh + cols.first * sw
    for r, r0, r_step in _runs(rows.key) if keys else _runs(rows.query, rows.T):
        for c, c0, c_step in _runs(cols.key) if keys else _runs(cols.query, cols.T):
            size = (len(x), rows.groups, r.stop - r.start, cols.groups, c.stop - c.start, h, w, *x.shape[3:])
            stride = (sb, sh, r_step * dh, sw, c_step * dw, dh, dw, *rest)
            yield r, c, x.as_strided(size, stride, origin + r0 * dh + c0 * dw)


def _grid(part: Part, keys: bool) -> tuple[int, ...]:
    rows, cols = part.rows, part.cols
    side = (rows.S, cols.S) if keys else (rows.T, cols.T)
    return rows.groups, len(rows.query), cols.groups, len(cols.query), *side


def _cut(x: torch.Tensor, part: Part, keys: bool = False) -> torch.Tensor:
    """Copies x (B, H, W, ...) into its tiles (B * n, T or S, ...)."""
    if part.whole:
        return x.flatten(1, 2)
    tiles = x.new_empty(len(x), *_grid(part, keys), *x.shape[3:])
    for r, c, view in _views(x, part, keys):
        tiles[:, :, r, :, c] = view
    return tiles.view(len(x) * part.n, part.S if keys else part.T, *x.shape[3:])


def _paste(tiles: torch.Tensor, x: torch.Tensor, part: Part) -> None:
    """Writes query tiles (B * n, T, ...) to their places in x (B, H, W, ...); of two on one place the owner is last."""
    tiles = tiles.reshape(len(x), *_grid(part, keys=False), *x.shape[3:])
    for r, c, view in _views(x, part, keys=False):
        view.copy_(tiles[:, :, r, :, c])


def _bias(part: Part, rpb: torch.Tensor | None, window: Window, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask, (n or 1, heads or 1, T, S): the position bias, -inf outside the windows."""
    if rpb is None:
        if part.dense:
            return None
        kh, kw = window.kernel
        rpb = like.new_zeros(1, 2 * kh - 1, 2 * kw - 1)
    table = rpb.flatten(1).to(like.dtype)
    if not part.dense:
        table = F.pad(table, (0, 1), value=float("-inf"))
    bias = table.index_select(1, part.pattern.flatten()).unflatten(1, part.pattern.shape)
    return (bias if part.tile_pattern is None else bias.index_select(1, part.tile_pattern)).transpose(0, 1)


def _chunks(B: int, part: Part, bytes_per_token: int, limit: int) -> list[slice]:
    step = B if part.whole else max(1, limit // (part.n * part.S * bytes_per_token))
    step = -(-B // -(-B // step)) if B else 1
    return [slice(i, min(i + step, B)) for i in range(0, B, step)]


# ---- The op ---------------------------------------------------------------------------------------------------------

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
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for part in _plan(H, W, window, q.device):
        bias = _bias(part, rpb, window, q)
        for images in _chunks(B, part, 2 * heads * d * q.element_size(), FORWARD_CHUNK):
            tiles = _cut(q[images], part), _cut(k[images], part, keys=True), _cut(v[images], part, keys=True)
            repeats = len(q[images]) if bias is not None and len(bias) > 1 else 1
            mask = bias if repeats == 1 else bias.repeat(repeats, 1, 1, 1)
            o, l = _attend(*(t.transpose(1, 2) for t in tiles), mask, scale)
            if part.whole:
                return o.transpose(1, 2).reshape(q.shape), l.transpose(1, 2).reshape(lse.shape)
            _paste(o.transpose(1, 2), out[images], part)
            _paste(l.transpose(1, 2), lse[images], part)
    return out, lse


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
    H, W, heads = q.shape[1:4]
    outs, lses = [], []
    for part in _plan(H, W, window, q.device):
        bias = _bias(part, rpb, window, q)
        # Tiles stand beside the heads here, not in the batch: the mask then broadcasts over a batch of unknown size.
        qt, kt, vt = (
            x.flatten(1, 2).index_select(1, index).unflatten(1, (part.n, -1)).transpose(2, 3).flatten(1, 2)
            for x, index in ((q, part.query), (k, part.key), (v, part.key))
        )
        if bias is not None:
            bias = bias.expand(part.n, heads, -1, -1).flatten(0, 1)[None]
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=bias, scale=scale)
        outs.append(out.unflatten(1, (part.n, -1)).transpose(2, 3).flatten(1, 2))
        if return_lse:
            scores = qt.float() @ kt.float().transpose(-1, -2) * scale
            lse = (scores if bias is None else scores + bias).logsumexp(-1)
            lses.append(lse.unflatten(1, (part.n, -1)).transpose(2, 3).flatten(1, 2))
    slot = torch.tensor(_slots(H, W, window), device=q.device)
    out, lse = (torch.cat(x, 1).index_select(1, slot).unflatten(1, (H, W)) if x else None for x in (outs, lses))
    return out, lse


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
    """Writes the gradients of q, k and v into dq, dk and dv and returns that of rpb.

    The weights are recomputed from the log-sum-exp; dS = P * (dP - rowsum(dout * out) + dlse).
    """
    B, H, W, heads, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    delta = (dout.to(wide) * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    lse2 = lse * LOG2E
    table = None if rpb is None else lse.new_zeros(heads, rpb[0].numel() + 1)  # the last column: masked pairs
    for into in (dk, dv):
        into.zero_()

    for part in _plan(H, W, window, q.device):
        bias = _bias(part, rpb, window, lse)
        bias = None if bias is None else bias * LOG2E
        dbias = None if rpb is None else lse.new_zeros(heads, part.n, part.T * part.S)
        for images in _chunks(B, part, 2 * heads * d * q.element_size(), BACKWARD_CHUNK):
            size = len(q[images])
            tq, tdo, tdelta, tlse = (_cut(x[images], part) for x in (q, dout, delta, lse2))
            tk, tv = (_cut(x[images], part, keys=True) for x in (k, v))
            tq, tdo, tk, tv = (x.to(wide) for x in (tq, tdo, tk, tv))
            if part.spare is not None:  # a query must not count twice: its weights become 2 ** -inf
                tlse = tlse.masked_fill(part.spare.repeat(size, 1)[..., None], float("inf"))
            gq, gk, gv = torch.empty_like(tq), torch.empty_like(tk), torch.empty_like(tv)
            for i in range(heads):  # views of one head are plain matrices with a row stride: no head-major copy
                qi, ki, vi, doi = (x[:, :, i] for x in (tq, tk, tv, tdo))
                minus_lse = -tlse[:, :, i, None]
                if bias is None:
                    p = torch.baddbmm(minus_lse, qi, ki.transpose(1, 2), alpha=scale * LOG2E)
                else:
                    start = bias[:, i if bias.shape[1] > 1 else 0] + minus_lse.unflatten(0, (size, part.n))
                    p = start.flatten(0, 1).baddbmm_(qi, ki.transpose(1, 2), alpha=scale * LOG2E)
                p = p.exp2_()  # not exp: that of -inf is several times slower on a CPU
                gv[:, :, i] = torch.bmm(p.transpose(1, 2), doi)
                ds = torch.bmm(doi, vi.transpose(1, 2)).sub_(tdelta[:, :, i, None]).mul_(p)
                gq[:, :, i] = torch.bmm(ds, ki)
                gk[:, :, i] = torch.bmm(ds.transpose(1, 2), qi)
                if dbias is not None:
                    dbias[i] += ds.view(size, part.n, -1).sum(0)
            if part.whole:
                dq.copy_(gq.mul_(scale).view_as(dq)), dk.copy_(gk.mul_(scale).view_as(dk)), dv.copy_(gv.view_as(dv))
                continue
            _paste(gq.mul_(scale), dq[images], part)
            for g, into in ((gk.mul_(scale), dk), (gv, dv)):
                into = into[images].view(size, H * W, heads, d)
                total = into if into.dtype == wide else g.new_zeros(into.shape)
                total.index_add_(1, part.key, g.view(size, -1, heads, d))
                if total is not into:  # parts meet in no position: this adds to zeros
                    into.add_(total)

        if dbias is not None:
            if part.tile_pattern is None:
                by_pattern = dbias.sum(1)
            else:
                patterns = len(part.pattern)
                by_pattern = dbias.new_zeros(heads, patterns, part.T * part.S).index_add_(1, part.tile_pattern, dbias)
            table.scatter_add_(1, part.pattern.flatten().expand(heads, -1), by_pattern.flatten(1))
    return None if rpb is None else table[:, :-1].reshape(rpb.shape)
