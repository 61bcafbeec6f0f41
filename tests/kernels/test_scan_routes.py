"""`scan_routes`: every traversal on hand-sized maps, permutations on all maps, and what a graph records of a table."""
from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import scan_routes
from visionbb.kernels.scan.routes import plan

sides = st.integers(1, 13)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("row", [[0, 1, 2, 3, 4, 5]]),
        ("row_reversed", [[5, 4, 3, 2, 1, 0]]),
        ("column", [[0, 3, 1, 4, 2, 5]]),
        ("snake_row", [[0, 1, 2, 5, 4, 3]]),
        ("snake_column", [[0, 3, 4, 1, 2, 5]]),
        ("snake_column_reversed", [[5, 2, 1, 4, 3, 0]]),
        ("window2", [[0, 1, 3, 4, 2, -1, 5, -1]]),
        ("window2_column", [[0, 3, 1, 4, 2, 5, -1, -1]]),
        ("window2_reversed", [[-1, 5, -1, 2, 4, 3, 1, 0]]),
        ("atrous2", [[0, 2], [3, 5], [1, -1], [4, -1]]),
        ("atrous1", [[0, 1, 2, 3, 4, 5]]),
        ("window3", [[0, 1, 2, 3, 4, 5, -1, -1, -1]]),
        ("atrous3", [[0], [3], [-1], [1], [4], [-1], [2], [5], [-1]]),
        ("bidirectional", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]),
        (("column", "window2"), [[0, 3, 1, 4, 2, 5, -1, -1], [0, 1, 3, 4, 2, -1, 5, -1]]),
    ],
)
def test_on_two_rows_of_three(name, expected):
    table = scan_routes(name, 2, 3)
    assert table.dtype == torch.int32
    assert table.tolist() == expected


def test_cross_is_in_vmambas_order():
    row, column, row_reversed, column_reversed = scan_routes("cross", 3, 4).tolist()
    assert row == list(range(12))
    assert column == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert (row_reversed, column_reversed) == (row[::-1], column[::-1])


def test_snakes_move_one_step_at_a_time():
    for route in scan_routes("snake", 5, 4):
        y, x = route // 4, route % 4
        assert (y.diff().abs() + x.diff().abs() == 1).all()


@given(st.sampled_from(["cross", "bidirectional", "snake", "row", "window1", "window2_column"]), sides, sides)
@settings(deadline=None)
def test_every_route_visits_every_token_once(name, H, W):
    for route in scan_routes(name, H, W):
        assert sorted(t for t in route.tolist() if t >= 0) == list(range(H * W))


@given(st.integers(1, 4), sides, sides)
@settings(deadline=None)
def test_atrous_shares_out_the_tokens(step, H, W):
    table = scan_routes(f"atrous{step}", H, W)
    assert table.shape == (step**2, -(-H // step) * -(-W // step))
    assert sorted(t for t in table.flatten().tolist() if t >= 0) == list(range(H * W))


def test_tables_are_kept_and_are_no_inference_tensors():
    with torch.inference_mode():
        table = scan_routes("cross", 61, 3)
    assert not table.is_inference()
    assert scan_routes("cross", 61, 3) is table


def test_plans_are_kept_until_the_table_is_written_to():
    table = scan_routes("cross", 4, 5).clone()
    first = plan(table, 20, "sum")
    assert plan(table, 20, "stack") is first
    table[0] = table[0].flip(0)
    again = plan(table, 20, "sum")
    assert first[0].back == (False, False)
    assert again[0].back == (True, True)
    table[0, 0] = 3
    with pytest.raises(ValueError, match=r"routes\[0\] visits token"):
        plan(table, 20, "sum")


@given(sides, sides, st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None)
def test_rows_and_columns_from_any_corner_stay_in_place(H, W, transpose, flip_y, flip_x):
    grid = torch.arange(H * W, dtype=torch.int32).view(H, W)
    grid = grid.flip([axis for axis, flip in ((0, flip_y), (1, flip_x)) if flip])
    route = (grid.t() if transpose else grid).flatten()
    (found,) = plan(route[None], H * W, "sum")
    layout, back = found.lattice, found.back
    rows = torch.arange(layout.run * (layout.runs - 1) + layout.step * (layout.T - 1) + 1)
    lines = rows.as_strided((layout.runs, layout.T), (layout.run, layout.step))
    assert torch.equal(lines.flip([i for i, f in enumerate(reversed(back)) if f]).flatten(), route.long())


def test_others_are_gathered():
    for name in ("snake", "window2"):
        assert all(route.lattice is None for route in plan(scan_routes(name, 4, 6), 24, "sum"))


class _Routes(torch.nn.Module):
    def forward(self, x):
        return scan_routes("snake", x.shape[1], x.shape[2], device=x.device) + 0


def test_compiles_and_exports_on_maps_of_any_size():
    module, sizes = _Routes(), [(4, 7), (6, 5), (9, 9)]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    H, W = (torch.export.Dim(name, min=2, max=64) for name in "HW")
    program = torch.export.export(module, (torch.zeros(1, 4, 7),), dynamic_shapes=({1: H, 2: W},)).module()
    for H, W in sizes:
        x = torch.zeros(1, H, W)
        assert torch.equal(compiled(x), scan_routes("snake", H, W))
        assert torch.equal(program(x), scan_routes("snake", H, W))


def test_traced_modules_follow_the_map():
    traced = torch.jit.trace(_Routes(), torch.zeros(1, 4, 6))
    assert torch.equal(traced(torch.zeros(1, 4, 6)), scan_routes("snake", 4, 6))


def test_scripted_modules_call_the_op():
    @torch.jit.script
    def f(x: torch.Tensor):
        return torch.ops.visionbb.scan_routes(["cross", "window2"], x.shape[1], x.shape[2], device=x.device)

    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(torch.zeros(1, 3, 5)), scan_routes(("cross", "window2"), 3, 5))


@pytest.mark.parametrize(
    ("routes", "H", "W", "message"),
    [
        ("diagonal", 4, 4, r"got 'diagonal'"),
        (("row", "windows2"), 4, 4, r"got 'windows2'"),
        ("cross_reversed", 4, 4, "got 'cross_reversed'"),
        ("window0", 6, 9, r"window side must be at least 1"),
        ("atrous0", 2, 9, r"'atrous0': a step must be at least 1"),
        ("row", 0, 4, "H and W must be at least 1, got 0 and 4"),
        ((), 4, 4, "at least one route"),
    ],
)
def test_errors(routes, H, W, message):
    with pytest.raises(ValueError, match=message):
        scan_routes(routes, H, W)
