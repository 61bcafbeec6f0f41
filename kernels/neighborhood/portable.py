"""Neighborhood attention in plain PyTorch: query tiles, each with the halo of keys that its windows touch.

A tile of neighbouring queries of one dilation group sees few keys more than one query does, so that attending densely
under a mask costs a small constant over the useful work, where a gather per query moves every key k*k times and a mask
over the map costs N x N. The map is cut into vertical strips, copied once with the columns of their halo; the rows of a
strip lie one after the other, so that a tile and its halo are slices of it. Where windows cover their group
(kernel * dilation = length), a tile is a group and nothing is masked; where a strip is as wide as the map, nothing is
copied.

Dilation groups of one length share all tables; a map has at most two lengths an axis, so that a plan has one to four
parts. Strips start at few distinct steps, so that strided views copy them without index tables. The work goes in chunks
of images that stay in cache: peak extra memory does not grow with the batch.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .._dispatch import caches
from .window import Window, axis_range

CHUNK = 12 << 20  # keys and values of the strips of one chunk of images, in bytes a thread
TILE_HEIGHTS, TILE_WIDTHS = range(1, 17), range(4, 33)
LOG2E = math.log2(math.e)


# ---- Plans: which tiles a geometry has ------------------------------------------------------------------------------

class Axis(NamedTuple):
    """Tiles along one axis, the same for `groups` dilation groups of equal length.

    Starts count inside a group: index i of group g stands at position g + dilation * i.
    """

    first: int  # first group
    groups: int
    dilation: int
    length: int  # of a group
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

    def spare(self) -> np.ndarray:
        """(tiles, T) bool: queries that stand in the next tile, too, which owns them."""
        after = np.append(self.query[1:], self.query[-1] + self.T)
        return np.array(self.query)[:, None] + np.arange(self.T) >= after[:, None]

    def patterns(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct offset tables (p, T, S), outside pairs marked, and which of them each tile has, (tiles,)."""
        codes, index = np.unique(np.where(self.inside, self.offset, OUTSIDE), axis=0, return_inverse=True)
        return codes, index.reshape(-1)


OUTSIDE = 1 << 30  # no offset


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
        first, groups, window.dilation[axis], length, tuple(query), tuple(low.tolist()), tile, int(halo), inside, offset
    )


def _candidates(length: int, window: Window, axis: int) -> list[list[Axis]]:
    """For each length of the axis's dilation groups, tilings of several tile sides."""
    dilation = window.dilation[axis]
    short, longer = divmod(length, dilation)  # `longer` groups have one member more
    lengths = [(0, longer, short + 1), (longer, dilation - longer, short)]
    sides = (TILE_HEIGHTS, TILE_WIDTHS)[axis]
    return [
        [_axis(first, groups, size, side, window, axis) for side in {-(-size // -(-size // t)) for t in sides}]
        for first, groups, size in lengths
        if groups and size
    ]


def _whole(rows: Axis, cols: Axis) -> bool:
    """Whether one strip is the map."""
    return rows.dilation == cols.dilation == len(cols.query) == 1


def _cost(rows: Axis, cols: Axis) -> float:
    """Rough time of a tiling, ns a head, from measurements on x86: scores, calls, copies."""
    T, S = rows.T * cols.T, rows.S * cols.S
    tiles = len(rows.query) * (4 * T * S + 5000 * math.ceil(T / 32) + 1500)  # the kernel takes 32 queries at a time
    copies = 0 if _whole(rows, cols) else 90 * rows.length * (cols.T + cols.S)
    return rows.groups * cols.groups * len(cols.query) * (tiles + copies)


class Part(NamedTuple):
    """Some of the tiles of a map: strips of tiles with T queries and S keys each (flattened over the two axes)."""

    rows: Axis
    cols: Axis
    T: int
    S: int
    whole: bool  # one strip that is the map: nothing to copy
    single: bool  # one tile holds all queries and keys of its strip
    dense: bool  # no key of any tile is masked
    pattern: torch.Tensor  # (p * strips * T * S,) index into [rpb, -inf] (rpb flattened)
    patterns: int  # p
    row_pattern: tuple[int, ...]  # which of the p each row of tiles has
    spare: torch.Tensor | None  # (row tiles, strips, T) queries that a later tile owns; None: there are none
    query: torch.Tensor  # (row groups * row tiles, column groups * strips, T) flat position of every query
    key: torch.Tensor  # (row groups * row tiles, column groups * strips, S) likewise

    @property
    def strips(self) -> int:
        return len(self.cols.query)


@functools.lru_cache(maxsize=128)
def _tables(H: int, W: int, window: Window) -> list[dict]:
    """The parts of a map, as `Part`'s fields with NumPy arrays."""
    kh, kw = window.kernel
    parts = []
    for row_choice in _candidates(H, window, 0):
        for col_choice in _candidates(W, window, 1):
            rows, cols = min(((r, c) for r in row_choice for c in col_choice), key=lambda pair: _cost(*pair))

            def grid(join, a: np.ndarray, b: np.ndarray) -> np.ndarray:
                """(rows, i) and (columns, j) to (rows, columns, i * j)."""
                return join(a[:, None, :, None], b[None, :, None, :]).reshape(len(a), len(b), -1)

            (dy, row_pattern), (dx, col_pattern) = rows.patterns(), cols.patterns()
            dy, dx = dy[:, None, :, None, :, None], dx[None, col_pattern, None, :, None, :]
            inside = np.maximum(dy, dx) < OUTSIDE
            if window.disc:
                inside &= dy**2 + dx**2 < window.radius**2
            pattern = np.where(inside, (dy + kh - 1) * (2 * kw - 1) + dx + kw - 1, (2 * kh - 1) * (2 * kw - 1))
            spare = grid(np.logical_or, rows.spare(), cols.spare())
            T, S = rows.T * cols.T, rows.S * cols.S
            parts.append(dict(
                rows=rows, cols=cols, T=T, S=S,
                whole=_whole(rows, cols),
                single=len(rows.query) == 1 and rows.length == rows.S,
                dense=bool(inside.all()),
                pattern=pattern.reshape(-1), patterns=len(pattern),
                row_pattern=tuple(row_pattern.tolist()),
                spare=spare if spare.any() else None,
                query=grid(np.add, rows.positions(rows.query, rows.T) * W, cols.positions(cols.query, cols.T)),
                key=grid(np.add, rows.positions(rows.key, rows.S) * W, cols.positions(cols.key, cols.S)),
            ))
    return parts


def _slots(H: int, W: int, window: Window) -> np.ndarray:
    """(H*W,) for every position a query slot that holds it, counted through the tiles of all parts."""
    slots = np.empty(H * W, dtype=np.int64)
    held = np.concatenate([fields["query"].reshape(-1) for fields in _tables(H, W, window)])
    slots[held] = np.arange(len(held))
    return slots


def _new_plan(H: int, W: int, window: Window, device: torch.device) -> list[Part]:
    def tensor(value):
        return torch.tensor(value, device=device) if isinstance(value, np.ndarray) else value

    return [Part(**{name: tensor(value) for name, value in fields.items()}) for fields in _tables(H, W, window)]


_plan = functools.lru_cache(maxsize=128)(_new_plan)


# ---- Moving strips --------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=128)
def _runs(starts: tuple[int, ...], step: int | None = None) -> list[tuple[slice, int, int]]:
    """Splits strips into runs of evenly spaced starts (apart by `step`, if given): (strips, first start, spacing)."""
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


def _views(
    x: torch.Tensor, part: Part, keys: bool = False, start: int = 0, stop: int | None = None, step: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Strided views of x (B, H, W, heads, d) that together are rows start:stop of all strips: (strips, view).

    A view is (B, row groups, column groups, strips, heads, rows, width, d). Its strips overlap unless `step` is their
    width.
    """
    (rows, cols), (sb, sh, sw, *rest) = (part.rows, part.cols), x.stride()
    heads, d = x.shape[3:]
    width, starts = (cols.S, cols.key) if keys else (cols.T, cols.query)
    dh, dw = rows.dilation * sh, cols.dilation * sw
    origin = x.storage_offset() + rows.first * sh + cols.first * sw + start * dh
    height = (rows.length if stop is None else stop) - start
    for strips, first, spacing in _runs(starts, step):
        size = (len(x), rows.groups, cols.groups, strips.stop - strips.start, heads, height, width, d)
        stride = (sb, sh, sw, spacing * dw, rest[0], dh, dw, rest[1])
        yield strips, x.as_strided(size, stride, origin + first * dw)


def _some(strips: torch.Tensor, which: slice) -> torch.Tensor:
    """Some of strips (B, row groups, column groups, strips, heads, rows, width, d)."""
    return strips.narrow(3, which.start, which.stop - which.start)


def _cut(x: torch.Tensor, part: Part, keys: bool = False) -> torch.Tensor:
    """Copies x (B, H, W, heads, d) into strips: (B * groups * strips * heads, length * width, d)."""
    (B, _, _, heads, d), (rows, cols) = x.shape, (part.rows, part.cols)
    width = cols.S if keys else cols.T
    strips = x.new_empty(B, rows.groups, cols.groups, part.strips, heads, rows.length, width, d)
    for which, view in _views(x, part, keys):
        _some(strips, which).copy_(view)
    return strips.view(-1, rows.length * width, d)


def _paste(tiles: torch.Tensor, x: torch.Tensor, part: Part, start: int) -> None:
    """Writes a row of query tiles (B * groups * strips * heads, T, d) to their places in x (B, H, W, heads, d).

    Of two on one place the owner is last, if rows are written in order.
    """
    rows, cols = part.rows, part.cols
    tiles = tiles.reshape(len(x), rows.groups, cols.groups, part.strips, x.shape[3], rows.T, cols.T, x.shape[4])
    for which, view in _views(x, part, start=start, stop=start + rows.T, step=cols.T):
        view.copy_(_some(tiles, which))


def _rows(strips: torch.Tensor, start: int, height: int, width: int) -> torch.Tensor:
    """Rows start:start + height of strips (..., length * width, d)."""
    return strips.narrow(-2, start * width, height * width)


def _bias(part: Part, rpb: torch.Tensor | None, window: Window, like: torch.Tensor) -> torch.Tensor | None:
    """Additive masks, (heads or 1, p * strips * T * S): the position bias, -inf outside the windows."""
    if rpb is None:
        if part.dense:
            return None
        kh, kw = window.kernel
        rpb = like.new_zeros(1, 2 * kh - 1, 2 * kw - 1)
    if rpb.dtype != like.dtype:
        rpb = rpb.to(like.dtype)
    table = rpb.flatten(1)
    if not part.dense:
        table = F.pad(table, (0, 1), value=float("-inf"))
    return table.index_select(1, part.pattern)


def _by_tile(bias: torch.Tensor, part: Part) -> torch.Tensor:
    """A `_bias` as (p, strips, heads or 1, T, S)."""
    return bias.view(-1, part.patterns, part.strips, part.T, part.S).permute(1, 2, 0, 3, 4)


def _masks(part: Part, rpb: torch.Tensor | None, window: Window, like: torch.Tensor, heads: int):
    """For each row of tiles its mask (1, strips * heads, T, S), or (1, 1, T, S) for all; or Nones."""
    bias = _bias(part, rpb, window, like)
    if bias is None:
        return [None] * len(part.row_pattern)
    bias = _by_tile(bias, part)
    if part.strips > 1:
        bias = bias.expand(-1, -1, heads, -1, -1)
    masks = bias.flatten(1, 2)[:, None].unbind()
    return [masks[pattern] for pattern in part.row_pattern]


def _chunks(B: int, part: Part, bytes_per_token: int) -> list[slice]:
    rows, cols = part.rows, part.cols
    image = rows.groups * cols.groups * part.strips * rows.length * cols.S * bytes_per_token
    step = max(1, caches() * CHUNK // image)
    step = -(-B // -(-B // step)) if B else 1
    return [slice(i, min(i + step, B)) for i in range(0, B, step)]


# ---- The op ---------------------------------------------------------------------------------------------------------

def _attend(q, k, v, bias, scale: float, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention on (B, heads, T, d); also its log-sum-exp (B, heads, T), if asked for."""
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    if q.device.type == "cpu":  # the kernel behind F.scaled_dot_product_attention, which hides the log-sum-exp
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) * scale @ k.to(wide).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v.to(wide)).to(v.dtype), scores.logsumexp(-1)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    window: Window,
    scale: float,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op without autograd: out like `v`, lse (B, H, W, heads)."""
    B, H, W, heads, d = q.shape
    parts = _plan(H, W, window, q.device)
    if parts and parts[0].whole:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return _uncut(q, k, v, rpb, parts[0], window, scale, return_lse)

    out, lse = q.new_empty(q.shape), None
    if return_lse:
        lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for part in parts:
        rows, cols = part.rows, part.cols
        masks = _masks(part, rpb, window, q, heads)
        for images in _chunks(B, part, 2 * heads * d * q.element_size()):
            strips = _cut(q[images], part), _cut(k[images], part, keys=True), _cut(v[images], part, keys=True)
            sq, sk, sv = (x.unflatten(0, (-1, part.strips * heads)) for x in strips)
            for query, key, mask in zip(rows.query, rows.key, masks, strict=True):
                tk, tv = (_rows(x, key, rows.S, cols.S) for x in (sk, sv))
                o, l = _attend(_rows(sq, query, rows.T, cols.T), tk, tv, mask, scale, return_lse)
                _paste(o, out[images], part, query)
                if return_lse:
                    _paste(l[..., None], lse[images][..., None], part, query)
    return out, lse


def forward_packed(
    qkv: torch.Tensor, rpb: torch.Tensor | None, window: Window, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`forward` of packed (B, H, W, 3, heads, d), by fewer views: that counts for small maps."""
    shape = qkv.shape
    parts = _plan(shape[1], shape[2], window, qkv.device)
    if not (parts and parts[0].whole):
        return forward(*qkv.unbind(3), rpb, window, scale, return_lse)
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind()
    return _uncut(q, k, v, rpb, parts[0], window, scale, return_lse)


def _uncut(q, k, v, rpb, part: Part, window: Window, scale: float, return_lse: bool):
    """`forward` where one strip is the map, of q, k, v (B, heads, H * W, d)."""
    rows, W = part.rows, part.cols.length
    B, heads, _, d = q.shape
    if part.single:
        mask = _bias(part, rpb, window, q)
        if mask is not None:
            mask = mask.view(1, -1, part.T, part.S)
        out, lse = _attend(q, k, v, mask, scale, return_lse)
        out = out.transpose(1, 2).contiguous()
        lse = lse.transpose(1, 2).contiguous() if return_lse else None
    else:
        tiles, masks = [], _masks(part, rpb, window, q, heads)
        for query, key, mask in zip(rows.query, rows.key, masks, strict=True):
            tq, tk, tv = _rows(q, query, rows.T, W), _rows(k, key, rows.S, W), _rows(v, key, rows.S, W)
            tiles.append(_attend(tq, tk, tv, mask, scale, return_lse))
        out, lse = (_joined(x, rows, W) if x[0] is not None else None for x in zip(*tiles, strict=True))
    out = out.view(B, rows.length, W, heads, d)
    return out, lse.view(B, rows.length, W, heads) if return_lse else None


def _joined(tiles: Sequence[torch.Tensor], rows: Axis, W: int) -> torch.Tensor:
    """Rows of tiles, (B, heads, T, ...), one below the other as (B, H * W, heads, ...)."""
    owned = [after - query for query, after in zip(rows.query, (*rows.query[1:], rows.length), strict=True)]
    return torch.cat([x.narrow(2, 0, n * W).transpose(1, 2) for x, n in zip(tiles, owned, strict=True)], 1)


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
    # Tensors made while a graph is recorded belong to that graph: they must not reach the cache.
    for part in _new_plan(H, W, window, q.device):
        grid = part.rows.groups, len(part.row_pattern), part.cols.groups, part.strips
        n = math.prod(grid)
        # Tiles stand beside the heads here, not in the batch: the mask then broadcasts over a batch of unknown size.
        qt, kt, vt = (
            x.flatten(1, 2).index_select(1, index.flatten()).unflatten(1, (n, -1)).transpose(2, 3).flatten(1, 2)
            for x, index in ((q, part.query), (k, part.key), (v, part.key))
        )
        bias = _bias(part, rpb, window, q)
        if bias is not None:
            bias = _by_tile(bias, part)
            bias = bias[list(part.row_pattern)][None, :, None].expand(*grid, heads, -1, -1).flatten(0, 4)[None]
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=bias, scale=scale)
        outs.append(out.unflatten(1, (n, -1)).transpose(2, 3).flatten(1, 2))
        if return_lse:
            scores = qt.float() @ kt.float().transpose(-1, -2) * scale
            lse = (scores if bias is None else scores + bias).logsumexp(-1)
            lses.append(lse.unflatten(1, (n, -1)).transpose(2, 3).flatten(1, 2))
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
    less = torch.stack((lse * -LOG2E, -delta), -1)  # what is added to the scores and to dP
    bias = None if rpb is None else rpb.to(lse.dtype) * LOG2E
    table = None if rpb is None else lse.new_zeros(heads, rpb[0].numel() + 1)  # the last column: masked pairs
    for part in _plan(H, W, window, q.device):
        rows, cols = part.rows, part.cols
        masks = _masks(part, bias, window, lse, heads)
        dbias = None if rpb is None else lse.new_zeros(part.patterns, part.strips * heads, part.T, part.S)
        for images in _chunks(B, part, 2 * heads * d * q.element_size()):
            sq, sdo, sless = (_cut(x[images], part).to(wide) for x in (q, dout, less))
            sk, sv = (_cut(x[images], part, keys=True).to(wide) for x in (k, v))
            if not part.single:
                gk, gv = torch.zeros_like(sk), torch.zeros_like(sv)
            dq_images = dq[images]
            for r, (query, key, mask) in enumerate(zip(rows.query, rows.key, masks, strict=True)):
                tq, tdo, tless = (_rows(x, query, rows.T, cols.T) for x in (sq, sdo, sless))
                tk, tv = (_rows(x, key, rows.S, cols.S) for x in (sk, sv))
                tlse, tdelta = tless.split(1, -1)
                if part.spare is not None:  # a query must not count twice: its weights become 2 ** -inf
                    spare = part.spare[r].repeat_interleave(heads, 0).repeat(len(tq) // (part.strips * heads), 1)
                    tlse = tlse.masked_fill(spare[..., None], float("-inf"))
                if mask is None:
                    p = torch.baddbmm(tlse, tq, tk.transpose(1, 2), alpha=scale * LOG2E)
                else:
                    start = (mask + tlse.view(-1, mask.shape[1], part.T, 1)).flatten(0, 1)
                    p = start.baddbmm_(tq, tk.transpose(1, 2), alpha=scale * LOG2E)
                p = p.exp2_()  # not exp: that of -inf is several times slower on a CPU
                tgv = torch.bmm(p.transpose(1, 2), tdo)
                ds = torch.baddbmm(tdelta, tdo, tv.transpose(1, 2)).mul_(p)
                tgk = torch.bmm(ds.transpose(1, 2), tq)
                if part.single:
                    gk, gv = tgk, tgv
                else:
                    _rows(gk, key, rows.S, cols.S).add_(tgk)
                    _rows(gv, key, rows.S, cols.S).add_(tgv)
                _paste(torch.bmm(ds, tk).mul_(scale), dq_images, part, query)
                if dbias is not None:
                    into = dbias[part.row_pattern[r]]
                    into.add_(ds.view(-1, *into.shape).sum(0))
            _put_back(gk.mul_(scale), dk[images], part)
            _put_back(gv, dv[images], part)

        if dbias is not None:
            by_head = dbias.unflatten(1, (part.strips, heads)).movedim(2, 0).flatten(1)
            table.scatter_add_(1, part.pattern.expand(heads, -1), by_head)
    return None if rpb is None else table[:, :-1].reshape(rpb.shape)


def _put_back(strips: torch.Tensor, x: torch.Tensor, part: Part) -> None:
    """Writes the sums of keys' strips (B * groups * strips * heads, length * width, d) to x (B, H, W, heads, d).

    Every key stands in a strip, being the query of a window that holds it.
    """
    rows, cols = part.rows, part.cols
    strips = strips.view(len(x), rows.groups, cols.groups, part.strips, x.shape[3], rows.length, cols.S, x.shape[4])
    written = 0  # columns
    for which, view in _views(x, part, keys=True):
        for i in range(which.start, which.stop):  # one by one: they overlap
            into, strip = view.select(3, i - which.start), strips.select(3, i)
            shared = max(written - cols.key[i], 0)
            if shared:
                into.narrow(-2, 0, shared).add_(strip.narrow(-2, 0, shared))
            into.narrow(-2, shared, cols.S - shared).copy_(strip.narrow(-2, shared, cols.S - shared))
            written = cols.key[i] + cols.S
