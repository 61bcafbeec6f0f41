"""Which keys a query of neighborhood attention sees: the integer geometry that every path shares."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """The geometry of one call, one entry per axis (height, width) where the entry is a pair."""

    kernel: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    causal: tuple[bool, bool] = (False, False)
    disc: bool = False
    clip: bool = False

    @property
    def radius(self) -> int:
        """CLEAR's r: a disc of kernel 2r-1 holds the keys with dy^2 + dx^2 < r^2."""
        return (self.kernel[0] + 1) // 2


def axis_range(
    length: int, kernel: int, dilation: int, stride: int, causal: bool, disc: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First key and number of keys of every position of one axis, counted inside its dilation group.

    Position i belongs to group g = i mod dilation, where it has index i div dilation; a group has
    L_g = ceil((length - g) / dilation) members, and key j of it stands at g + dilation * j (Hassani et al.,
    "Neighborhood Attention Transformer" and "Dilated Neighborhood Attention Transformer"; stride as in "Generalized
    Neighborhood Attention"). Windows are shifted inwards at the borders, so that every query sees `kernel` keys;
    causal and disc windows are cut off there instead, as is every window longer than its group.

    Returns:
        start, count: int64, shape (length,). NumPy, so that no graph capture or device is involved.
    """
    i = np.arange(length)
    group, q = i % dilation, i // dilation
    size = (length - group + dilation - 1) // dilation
    if disc:
        start = np.maximum(q - kernel // 2, 0)
        return start, np.minimum(q + kernel // 2 + 1, size) - start
    if causal:
        leader = np.minimum(q // stride * stride + stride - 1, size - 1)
        start = np.maximum(leader - kernel + 1, 0)
        return start, q - start + 1
    leader = np.minimum(q // stride * stride + stride // 2, size - 1)
    start = np.minimum(np.maximum(leader - kernel // 2, 0), np.maximum(size - kernel, 0))
    return start, np.minimum(size, kernel)


def attended_pairs(H: int, W: int, window: Window) -> int:
    """Number of (query, key) pairs of one map: the useful work of one head."""
    def along(axis: int, length: int) -> np.ndarray:
        return axis_range(
            length, window.kernel[axis], window.dilation[axis], window.stride[axis], window.causal[axis], window.disc
        )[1]

    if not window.disc:
        return int(along(0, H).sum() * along(1, W).sum())
    # Pairs at in-group distance (dy, dx): (pairs of rows that far apart) x (pairs of columns), over the offsets inside.
    reach = np.arange(1 - window.radius, window.radius)
    rows, cols = (
        np.maximum(length - abs(reach) * window.dilation[axis], 0) for axis, length in enumerate((H, W))
    )
    inside = reach[:, None] ** 2 + reach[None, :] ** 2 < window.radius**2
    return int((rows[:, None] * cols[None, :] * inside).sum())
