"""Traversals of a map as tables of token indices.

A route is a row of an int32 table (K, steps): entry t is the raster index of the token that step t visits, or
`PAD` (a token of zeros, which decays the state as its time step says) or `NEUTRAL` (a step that leaves the state as
it is).
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

PAD, NEUTRAL = -1, -2
MERGES = ("sum", "scatter", "stack")
SETS = {
    "cross": ("row", "column", "row_reversed", "column_reversed"),
    "bidirectional": ("row", "row_reversed"),
    "snake": ("snake_row", "snake_row_reversed", "snake_column", "snake_column_reversed"),
}
GRAMMAR = re.compile(
    r"(?P<base>row|column|snake_row|snake_column|window(?P<side>\d+)(?:_column)?)(?P<reversed>_reversed)?"
)


# ---- Tables ---------------------------------------------------------------------------------------------------------

def _padded(grid: torch.Tensor, multiple: int) -> torch.Tensor:
    """The grid with PAD below and to the right, up to a multiple in both axes."""
    return F.pad(grid, (0, -grid.shape[1] % multiple, 0, -grid.shape[0] % multiple), value=PAD)


def _single(name: str, grid: torch.Tensor) -> torch.Tensor:
    """One route by its name."""
    parts = GRAMMAR.fullmatch(name)
    if parts is None:
        raise ValueError(
            f"routes must be {', '.join(SETS)}, atrous<step>, or of row, column, snake_row, snake_column,"
            f" window<side>, window<side>_column, each also with _reversed; got {name!r}"
        )
    base, side = parts["base"], parts["side"] and int(parts["side"])
    if side == 0:
        raise ValueError(f"{name!r}: a window side must be at least 1")
    if "column" in base:
        grid = grid.t()
    if side:
        grid = _padded(grid, side)
        grid = grid.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
    elif "snake" in base:
        odd = torch.arange(grid.shape[0], device=grid.device) % 2 == 1
        grid = torch.where(odd[:, None], grid.flip(1), grid)
    route = grid.flatten()
    return route.flip(0) if parts["reversed"] else route


def _atrous(step: int, grid: torch.Tensor) -> list[torch.Tensor]:
    """The step * step sub-grids, row-major and column-major in turns; the next sub-grid is one row down."""
    if step < 1:
        raise ValueError(f"'atrous{step}': a step must be at least 1")
    grid = _padded(grid, step)
    parts = [grid[i::step, j::step] for j in range(step) for i in range(step)]
    return [(part.t() if k % 2 else part).flatten() for k, part in enumerate(parts)]


def table(routes: Sequence[str], H: int, W: int, device: torch.device | None) -> torch.Tensor:
    """`scan_routes` in standard operators, so that a graph that is being recorded holds it at any size."""
    if H < 1 or W < 1:
        raise ValueError(f"H and W must be at least 1, got {H} and {W}")
    if not routes:
        raise ValueError("routes must name at least one route")
    grid = torch.arange(H * W, dtype=torch.int32, device=device).view(H, W)
    found = []
    for name in routes:
        if name.startswith("atrous") and name[6:].isdecimal():
            found += _atrous(int(name[6:]), grid)
        else:
            found += [_single(single, grid) for single in SETS.get(name, (name,))]
    steps = max(route.shape[0] for route in found)  # len() would fix the size of a recorded graph
    return torch.stack([F.pad(route, (0, steps - route.shape[0]), value=PAD) for route in found])


# ---- What the portable path makes of a table ------------------------------------------------------------------------

class Layout(NamedTuple):
    """Rows of a buffer as `runs` runs of `T` steps: step t of run i is row `step * t + run * i`."""

    T: int
    runs: int
    step: int
    run: int

    @classmethod
    def line(cls, length: int, width: int) -> Layout:
        """Rows one after another, `width` values each. Rows beyond `length` are to be neutral.

        One run of all steps has the fewest passes over memory; many runs side by side have fewer calls, which is what
        counts while a row is short.
        """
        T = max(1, round((length / 2) ** 0.5))  # of 2 T + runs calls, the fewest
        if width > 2600 * (1 - 3 / length**0.5):
            T = length
        return cls(T, -(-length // T), 1, T)

    @property
    def rows(self) -> int:
        return self.T * self.runs


# Whether the steps of a run, and the runs, are counted from their ends.
Direction = tuple[bool, bool]


class Route(NamedTuple):
    """How the portable path follows one route."""

    lattice: Layout | None  # the route lies on the map as evenly strided runs, or one: nothing needs to move
    back: Direction
    index: torch.Tensor  # (steps,) token of every step; 0 where there is none
    pads: torch.Tensor  # steps that visit no token
    neutral: torch.Tensor  # those of them that leave the state alone
    tokens: torch.Tensor  # (visited,) the tokens in ascending order
    steps: torch.Tensor  # (visited,) their steps


def _lattice(route: torch.Tensor, length: int) -> tuple[Layout | None, Direction]:
    """Recognises rows and columns, from any corner, in a permutation of all tokens."""
    gathered = None, (False, False)
    if len(route) != length or int(route.min()) < 0:
        return gathered
    breaks = (route.diff() != route[:2].diff()).nonzero()
    T = int(breaks[0]) + 1 if len(breaks) else length
    if length % T:
        return gathered
    route = route.view(-1, T)
    step, run = (int(x[1] - x[0]) if len(x) > 1 else 1 for x in (route[0], route[:, 0]))
    expected = route[0, 0] + run * torch.arange(len(route))[:, None] + step * torch.arange(T)
    if not torch.equal(expected, route):
        return gathered
    return Layout(T, length // T, abs(step), abs(run)), (step < 0, (run if len(route) > 1 else step) < 0)


def _plan(routes: torch.Tensor, length: int) -> tuple[list[Route], str, str]:
    """The routes, and what is wrong with the table for merges of whole routes, and for "scatter"; "" if nothing is."""
    table = routes.cpu().long()
    if int(table.min()) < NEUTRAL or int(table.max()) >= length:
        wrong = f"routes must hold tokens 0 to {length - 1}, or {PAD} and {NEUTRAL} for pads, got {int(table.min())}"
        wrong += f" to {int(table.max())}"
        return [], wrong, wrong
    whole, plan = "", []
    for k, route in enumerate(table):
        visits = torch.bincount(route[route >= 0], minlength=length)
        if not whole and bool((visits != 1).any()):
            token = int((visits != 1).nonzero()[0])
            whole = f"every route must visit every token once; routes[{k}] visits token {token} {visits[token]} times"
        steps = route.argsort()[int((route < 0).sum()):]
        pads, neutral = (route < 0).nonzero().flatten(), (route == NEUTRAL).nonzero().flatten()
        tensors = (x.to(routes.device) for x in (route.clamp(min=0), pads, neutral, route[steps], steps))
        plan.append(Route(*_lattice(route, length), *tensors))
    visits, scatter = torch.bincount(table[table >= 0], minlength=length), ""
    if bool((visits != 1).any()):
        token = int((visits != 1).nonzero()[0])
        scatter = f"the routes together must visit every token once; they visit token {token} {visits[token]} times"
    return plan, whole, scatter


_plans = WeakIdKeyDictionary()  # table -> (its version, the number of tokens, plan)


def plan(routes: torch.Tensor, length: int, merge: str) -> list[Route]:
    """The routes of a table over `length` tokens, read once for every table.

    Raises:
        ValueError: an entry that is no token, or routes that do not visit every token once.
    """
    if routes.is_inference():  # has no version to tell whether it was written to
        found = _plan(routes, length)
    else:
        version, known, found = _plans.get(routes, (None, None, None))
        if (version, known) != (routes._version, length):
            found = _plan(routes, length)
            _plans[routes] = routes._version, length, found
    kept, whole, scatter = found
    wrong = scatter if merge == "scatter" else whole
    if wrong:
        raise ValueError(f"merge={merge!r}: {wrong}")
    return kept
