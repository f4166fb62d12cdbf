import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sealed import Content, refused_by, resealed
from structures import genomes, names, random_genomes, space_of, tiny_space

from engine.errors import UserError
from engine.layer_times import GridPlan, axis_points, find_step, kinds_of, make_grid, plan_grids
from engine.space import Space
from engine.space.latency_table import (
    LatencyTable,
    LayerGrid,
    LayerKind,
    for_space,
    layer_kinds,
    load_latency_table,
)

Truth = Callable[[int, int], float]
KIND = LayerKind(14, 1, 1, False, "relu", False, False, False)


def grid_of(plan: GridPlan, truth: Truth) -> LayerGrid:
    return make_grid(plan, [[(truth(i, o), 0.01) for o in plan.out_widths] for i in plan.in_widths])


def grid(ins: tuple[int, ...], outs: tuple[int, ...], truth: Truth, step: int = 1) -> LayerGrid:
    return grid_of(GridPlan(KIND, ins, outs, step, step), truth)


def table_of(space: Space, truth: Truth = lambda i, o: i * o / 1e4, points: int = 3, step: int = 1) -> LatencyTable:
    axes = kinds_of(space, 32)
    plans = plan_grids(axes, points, {(one.category, name): step for one in axes for name in ("in", "out")})
    table = LatencyTable(
        space.architecture, space.classes, {"resolution": 32}, {"cpu": "made up"}, {"torch": "2"},
        tuple(grid_of(plan, truth) for plan in plans), constant_ms=0.25, scale=1.5,
    )  # fmt: skip
    return for_space(table, space)


def noisy(seed: int) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    return lambda i, o: float(torch.rand((), generator=generator)) * i * o


# -- grids ---------------------------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000))
def test_a_grid_that_never_falls_is_exact_at_its_points(a: int, b: int, seed: int) -> None:
    steps_AB = torch.rand(a, b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ms_AB = steps_AB.cumsum(0).cumsum(1)
    ins, outs = tuple(3 * i + 1 for i in range(a)), tuple(5 * i + 2 for i in range(b))
    measured = grid(ins, outs, lambda i, o: float(ms_AB[ins.index(i), outs.index(o)]))
    assert torch.equal(measured.at(torch.tensor(ins)[:, None], torch.tensor(outs)[None]), ms_AB)


@given(st.integers(0, 1000), st.sampled_from([1, 4, 16]))
def test_times_never_fall_when_a_width_grows_however_noisy_they_were(seed: int, step: int) -> None:
    measured = grid((16, 32, 64, 100), (16, 48, 64, 128), noisy(seed), step)
    ms_IO = measured.at(torch.arange(1, 101)[:, None], torch.arange(1, 129)[None])
    rounding = 1e-12 * float(ms_IO.max())
    assert float(ms_IO.diff(dim=0).min()) >= -rounding
    assert float(ms_IO.diff(dim=1).min()) >= -rounding


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_on_a_staircase_no_width_is_cheaper_than_its_block(step: int) -> None:
    def stairs(i: int, o: int) -> float:
        return 1 + -(-i // step) * -(-o // step)

    points = axis_points((10, 256), 5, step)
    measured = grid(points, points, stairs, step)
    widths = torch.arange(1, 257)
    truth = 1 + torch.ceil(widths / step)[:, None] * torch.ceil(widths / step)[None]
    predicted = measured.at(widths[:, None], widths[None])
    first = points[0] - step  # what is narrower than the first block costs what that does
    torch.testing.assert_close(predicted[first:, first:], truth[first:, first:].double())
    assert bool((predicted >= truth - 1e-9).all())


def test_between_two_blocks_an_uneven_staircase_is_not_undercut_either() -> None:
    measured = grid((16, 32), (1,), lambda i, o: {16: 1.0, 32: 5.0}[i], 16)
    between = measured.at(torch.tensor([9, 16, 17, 24, 32]), torch.tensor(1))
    assert between.tolist() == [1.0, 1.0, 5.0, 5.0, 5.0]


@given(st.sampled_from([4, 8, 16, 32]), st.integers(0, 1000))
def test_blocks_are_found_in_noisy_times(step: int, seed: int) -> None:
    widths = torch.tensor([68, 72, 76, 80, 84, 88, 92, 96, 112, 128])
    noise = 1 + 0.01 * torch.randn(len(widths), generator=torch.Generator().manual_seed(seed))
    ms = (0.2 + torch.ceil(widths / step) * step / 100) * noise
    assert find_step(widths.tolist(), ms.tolist(), 4) == step


def test_points_are_blocks_denser_where_narrow_and_end_at_the_greatest_width() -> None:
    # Squares of 10.1, 17.4, 24.7 and 32: equal steps of the square root.
    assert axis_points((102, 1024), 4, 1) == (102, 303, 610, 1024)
    assert axis_points((4, 44), 8, 16) == (16, 32, 44)
    assert axis_points((7, 7), 3, 1) == (7,)


# -- structures ----------------------------------------------------------------------------------------------------


@given(st.data(), names, st.integers(0, 100))
def test_a_structure_never_gets_faster_when_a_gene_grows(data: st.DataObject, name: str, seed: int) -> None:
    space = space_of(name)
    table = table_of(space, noisy(seed))
    genome_1G = data.draw(genomes(space))
    wider_GG = (genome_1G + torch.eye(len(space.genes), dtype=torch.int64)).clamp(max=space.choices - 1)
    before, after = table.predict(genome_1G), table.predict(wider_GG)
    assert bool((after >= before * (1 - 1e-12)).all())


@given(names, st.integers(0, 100))
def test_a_structure_gets_the_same_time_alone_and_in_a_population(name: str, seed: int) -> None:
    space = space_of(name)
    table = table_of(space, noisy(seed))
    genome_PG = random_genomes(space, 33, seed)
    alone = torch.cat([table.predict(genome_1G) for genome_1G in genome_PG.split(1)])
    assert torch.equal(table.predict(genome_PG), alone)
    assert table.predict(genome_PG).dtype == torch.float64
    assert table.predict(genome_PG[:0]).shape == (0,)


@given(st.data())
def test_a_prediction_is_the_constant_and_the_scaled_sum_of_the_layers(data: st.DataObject) -> None:
    space = tiny_space()
    table = table_of(space, lambda i, o: i + 3 * o + i * o)
    genome_1G = data.draw(genomes(space))
    channels = {"image": 3, **dict(zip(space.conv_index, space.widths(genome_1G)[0].tolist(), strict=True))}
    grids = {grid.kind: grid for grid in table.grids}
    total = 0.0
    for conv, kind in zip(space.convs, layer_kinds(space, 32), strict=True):
        cin = 1 if conv.depthwise else channels[conv.source]
        total += float(grids[kind].at(torch.tensor(cin), torch.tensor(channels[conv.name])))
    torch.testing.assert_close(table.predict(genome_1G), torch.tensor([0.25 + 1.5 * total], dtype=torch.float64))
    assert torch.equal(table.to("cpu").predict(genome_1G), table.predict(genome_1G))


def test_layers_of_one_kind_share_a_grid() -> None:
    axes = kinds_of(space_of("mobilenet_v1"), 224)
    # The stem; 1×1 convolutions at 112, 56, 28, 14 and 7 px; depthwise ones of stride 1 there and of stride 2 above 7.
    assert len(axes) == 1 + 5 + 5 + 4
    wide = next(one for one in axes if one.kind.side == 14 and one.category == "1x1")
    assert (wide.ins, wide.outs) == ((25, 512), (51, 512))


def test_what_the_range_says_is_what_the_ends_take() -> None:
    space = tiny_space()
    table = table_of(space)
    least, greatest = table.legal_range(space)
    assert least == float(table.predict(space.uniform_choice(0)))
    assert greatest == float(table.predict(space.uniform_choice(30)))


# -- files ---------------------------------------------------------------------------------------------------------


@given(names, st.integers(0, 100))
def test_a_table_is_read_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, name: str, seed: int) -> None:
    path, space = tmp_path_factory.mktemp("table") / "table.json", space_of(name, 10)
    table = table_of(space, noisy(seed))
    table.save(path)
    read = load_latency_table(path, space)
    assert read == table
    assert torch.equal(read.lookup_KCC, table.lookup_KCC)
    assert load_latency_table(path) == table


def refused(path: Path, content: str | bytes, space: Space | None = None) -> str:
    """Write a file and return the one line with which it is refused."""
    return refused_by(partial(load_latency_table, space=space), path, content)


def put(*keys: Any, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


DAMAGE: dict[str, tuple[Callable[[Content], object], str]] = {
    "another schema": (put("schema", value="metaprune.latency/9"), "not supported"),
    "a missing field": (lambda content: content.pop("scale"), "missing: scale"),
    "no number": (put("grids", 0, "ms", 0, 0, value=float("nan")), "finite"),
    "an endless time": (put("grids", 0, "ms", 0, 0, value=float("inf")), "finite"),
    "a negative time": (put("grids", 0, "ms", 0, 0, value=-0.1), "from 0"),
    "a word for a time": (put("grids", 0, "ms", 0, 0, value="1"), "from 0"),
    "true for a time": (put("grids", 0, "ms", 0, 0, value=True), "from 0"),
    "a giant time": (put("grids", 0, "ms", 0, 0, value=10**400), "not a valid latency table"),
    "a negative spread": (put("grids", 0, "spread", 0, 0, value=-1), "from 0"),
    "a row too short": (lambda content: content["grids"][0]["ms"][0].pop(), "every pair"),
    "a row too few": (lambda content: content["grids"][3]["spread"].pop(), "every pair"),
    "no points": (put("grids", 0, "in_widths", value=[]), "growing"),
    "points in disorder": (lambda content: content["grids"][2]["out_widths"].reverse(), "growing"),
    "half a channel": (put("grids", 0, "out_widths", 0, value=3.5), "growing"),
    "a step of nothing": (put("grids", 0, "out_step", value=0), "from 1"),
    "a layer too few": (lambda content: content["grids"].pop(), "lacks the layer"),
    "points that end too early": (put("grids", 0, "out_widths", -1, value=31), "it ends at 31"),
    "a kind of another form": (put("grids", 0, "kind", value={"side": 3}), "not a valid latency table"),
    "a kind that is a list": (put("grids", 0, "kind", "side", value=[]), "not a valid latency table"),
    "a constant below zero": (put("constant_ms", value=-1), "from 0"),
    "a scale of zero": (put("scale", value=0), "above 0"),
    "a resolution that is no integer": (put("settings", "resolution", value="224"), "integers from 1"),
    "no resolution": (put("settings", value={}), "not a valid latency table"),
    "settings that are a list": (put("settings", value=[]), "objects"),
    "an unknown architecture": (put("architecture", value="vgg"), "choose one of"),
    "an architecture that is a list": (put("architecture", value=[]), "name"),
    "no classes": (put("classes", value=0), "integers from 1"),
    "grids that are a number": (put("grids", value=3), "not a valid latency table"),
    "fits that are words": (put("fitted", value=["x"]), "list of objects"),
}


@pytest.mark.parametrize(("change", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_table_that_cannot_have_been_measured_is_refused(
    change: Callable[[Content], object], says: str, tmp_path: Path
) -> None:
    content = table_of(space_of("mobilenet_v1", 10)).to_dict()
    change(content)
    assert says in refused(tmp_path / "table.json", resealed(content))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, b"\xff\xfe"])
def test_what_is_no_table_is_refused(text: str | bytes, tmp_path: Path) -> None:
    assert "latency table" in refused(tmp_path / "table.json", text)


def test_a_changed_table_is_refused(tmp_path: Path) -> None:
    content = table_of(space_of("mobilenet_v1", 10)).to_dict()
    content["grids"][0]["ms"][0][0] += 1e-3
    assert "digest" in refused(tmp_path / "table.json", json.dumps(content))


def test_a_table_of_another_architecture_is_refused(tmp_path: Path) -> None:
    content = table_of(space_of("mobilenet_v1", 10)).to_dict()
    assert "mobilenet_v1, not of mobilenet_v2" in refused(
        tmp_path / "table.json", json.dumps(content), space_of("mobilenet_v2", 10)
    )


def test_a_table_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    table_of(space_of("mobilenet_v1", 10)).save(tmp_path / "table.json")
    with pytest.raises(UserError, match="it is of 10 classes, not of 1000"):
        load_latency_table(tmp_path / "table.json", space_of("mobilenet_v1", 1000))
