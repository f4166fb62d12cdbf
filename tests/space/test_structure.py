import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed import Content, refused_by, resealed
from structures import genomes, names, space_of

from engine.errors import UserError
from engine.space import rounded
from engine.space.costs import cost_model
from engine.space.structure import Structure, load_structure, make_structure

PROVENANCE: Content = {
    "score": {"correct": 300, "images": 360, "loss": 0.5, "split": "sub_validation"},
    "preprocessing": {"resolution": 32, "mean": [0.5, 0.5, 0.5]},
    "pruningnet": "a" * 64,
    "splits": "b" * 64,
}


def structure_of(name: str = "mobilenet_v1", choice: int = 13) -> Structure:
    costs = cost_model(space_of(name, 10), 224)
    return make_structure(costs, costs.space.uniform_choice(choice)[0], 32, **PROVENANCE)


@given(st.data(), names, st.sampled_from(["macs", "metapruning"]), st.sampled_from([1, 8]))
def test_a_structure_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, convention: Any, divisor: int
) -> None:
    path = tmp_path_factory.mktemp("structure") / "structure.json"
    costs = cost_model(rounded(space_of(name, 10), divisor), 64, convention)
    structure = make_structure(costs, data.draw(genomes(costs.space))[0], 32, **PROVENANCE)
    structure.save(path)
    assert load_structure(path) == structure
    assert {conv["out_channels"] % divisor for conv in structure.convolutions if conv["full_width"] >= 8} == {0}


def test_a_structure_states_its_cost_and_every_convolution_with_its_full_width(tmp_path: Path) -> None:
    structure = structure_of(choice=30)
    structure.save(tmp_path / "structure.json")
    content = json.loads((tmp_path / "structure.json").read_text())
    # 568,740,352 MACs with 1000 classes (test_costs.py), of which 1024 · 990 belong to the 990 classes missing here.
    assert content["macs"] == 568_740_352 - 1024 * 990
    assert [conv["out_channels"] for conv in content["convolutions"]] == [
        conv["full_width"] for conv in content["convolutions"]
    ]
    assert content["convolutions"][1] == {
        "name": "block1.depthwise", "source": "stem", "in_channels": 32, "out_channels": 32, "full_width": 32,
        "kernel": 3, "stride": 1, "depthwise": True, "activation": "relu", "shortcut": None, "max_pool": False,
    }  # fmt: skip


def test_a_failed_write_leaves_the_old_structure_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "structure.json"
    old, new = structure_of(choice=3), structure_of(choice=4)
    old.save(path)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("engine.files.os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        new.save(path)
    assert load_structure(path) == old
    assert list(tmp_path.iterdir()) == [path]


# -- attacks -------------------------------------------------------------------------------------------------------


def refused(path: Path, content: str | bytes) -> str:
    """Write a file and return the one line with which it is refused."""
    return refused_by(load_structure, path, content)


def with_field(name: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content.update({name: value})


def with_conv(index: int, name: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content["convolutions"][index].update({name: value})


attacks: dict[str, tuple[Callable[[Content], None], str]] = {
    "unknown schema": (with_field("schema", "metaprune.structure/1"), "reads 'metaprune.structure/2'"),
    "another divisor": (with_field("divisor", 8), "stem cannot have 15 channels; legal widths are 8, 16, 24, 32"),
    "a divisor of none": (with_field("divisor", 0), "at least 1"),
    "no schema": (lambda content: content.pop("schema"), "schema None is not supported"),
    "unknown architecture": (with_field("architecture", "vgg"), "'vgg': choose one of mobilenet_v1"),
    "another architecture": (with_field("architecture", "resnet50"), "a resnet50 genome has 20 genes"),
    "architecture of a list": (with_field("architecture", ["mobilenet_v1"]), "not a valid structure"),
    "missing field": (lambda content: content.pop("macs"), "fields are missing: macs"),
    "missing convolutions": (lambda content: content.pop("convolutions"), "fields are missing: convolutions"),
    "illegal width": (with_conv(0, "out_channels", 2), "stem cannot have 2 channels; legal widths are 3, 4, "),
    "fixed width": (with_conv(-1, "out_channels", 512), "has a fixed width of 1024"),
    "untied width": (with_conv(1, "out_channels", 3), "block1.depthwise must be as wide as"),
    "huge width": (with_conv(0, "out_channels", 2**80), "not a valid structure"),
    "width of a string": (with_conv(0, "out_channels", "16"), "not a valid structure"),
    "renamed convolution": (with_conv(0, "name", "root"), "not those of mobilenet_v1"),
    "another kernel": (with_conv(0, "kernel", 5), "not those of its genome"),
    "missing convolution": (lambda content: content["convolutions"].pop(), "not those of mobilenet_v1"),
    "convolution without a name": (lambda content: content["convolutions"][3].pop("name"), "not a valid structure"),
    "convolutions of numbers": (with_field("convolutions", [1, 2]), "not a valid structure"),
    "convolutions of nothing": (with_field("convolutions", None), "not a valid structure"),
    "widths of another genome": (lambda content: content["genome"].__setitem__(0, 0), "not those of its genome"),
    "choice out of range": (lambda content: content["genome"].__setitem__(0, 31), "choices must be 0 to 30"),
    "negative choice": (lambda content: content["genome"].__setitem__(0, -1), "choices must be 0 to 30"),
    "huge choice": (lambda content: content["genome"].__setitem__(0, 2**64), "not a valid structure"),
    "short genome": (lambda content: content["genome"].pop(), "has 13 genes"),
    "empty genome": (with_field("genome", []), "has 13 genes"),
    "genome of strings": (with_field("genome", ["13"] * 13), "genome must be integers"),
    "genome of truths": (with_field("genome", [True] * 13), "genome must be integers"),
    "genome of a string": (with_field("genome", "13" * 13), "genome must be a list"),
    "genome of a number": (with_field("genome", 13), "genome must be a list"),
    "genome of nothing": (with_field("genome", None), "genome must be a list"),
    "other MACs": (lambda content: content.update(macs=content["macs"] - 1), "not what it says"),
    "other parameters": (lambda content: content.update(parameters=content["parameters"] + 1), "not what it says"),
    "MACs of a fraction": (lambda content: content.update(macs=float(content["macs"])), "macs.*must be integers"),
    "other resolution of the MACs": (with_field("flops_resolution", 192), "not what it says"),
    "resolution of the MACs too small": (with_field("flops_resolution", 16), "at least 32 pixels"),
    "huge resolution of the MACs": (with_field("flops_resolution", 10**400), "not a valid structure"),
    "other convention": (with_field("flops_convention", "metapruning"), "not what it says"),
    "unknown convention": (with_field("flops_convention", "flops"), "unknown FLOPs convention 'flops'"),
    "convention of a list": (with_field("flops_convention", []), "unknown FLOPs convention"),
    "no classes": (with_field("classes", 0), "not a valid structure"),
    "other classes": (with_field("classes", 11), "not what it says"),
    "huge classes": (with_field("classes", 10**400), "not a valid structure"),
    "resolution of a string": (with_field("resolution", "32"), "resolution.*must be integers"),
    "score of a list": (with_field("score", [1, 2]), "score must be objects"),
    "preprocessing of nothing": (with_field("preprocessing", None), "preprocessing.*must be objects"),
}  # fmt: skip


@pytest.mark.parametrize("attack", attacks)
def test_content_that_is_wrong_is_refused_even_under_a_digest_that_is_right(tmp_path: Path, attack: str) -> None:
    change, reason = attacks[attack]
    content = structure_of().to_dict()
    change(content)
    assert re.search(reason, refused(tmp_path / "structure.json", resealed(content)))


def test_a_digest_that_does_not_match_is_refused(tmp_path: Path) -> None:
    content = structure_of().to_dict()
    for digest in ("0" * 64, None, 7, ["0"]):
        message = refused(tmp_path / "structure.json", json.dumps({**content, "digest": digest}))
        assert "the digest does not match" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"structure", "not valid JSON"),
        (b"\x80\x04\x95pickle", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "it holds a list, not an object"),
        (b'"structure"', "it holds a str, not an object"),
        (b"null", "it holds a NoneType, not an object"),
        (b"{}", "schema None is not supported"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schema": ' + b'{"schema": ' * 100_000, "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refused(tmp_path / "structure.json", content)


@pytest.mark.parametrize("depth", range(50, 1000, 50))
def test_nesting_of_any_depth_is_refused_and_never_overflows(tmp_path: Path, depth: int) -> None:
    # The depths that json reads, but that the digest or a comparison may not survive, lie somewhere in between.
    nested = "[" * depth + "]" * depth
    written = json.dumps({**structure_of().to_dict(), "score": {"nested": None}, "genome": "HERE"})
    for place in ('"HERE"', "null"):
        refused(tmp_path / "structure.json", written.replace(place, nested))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    written = json.dumps(structure_of().to_dict(), indent=2)
    for length in range(0, len(written), 97):
        refused(tmp_path / "structure.json", written[:length])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(UserError, match=f"cannot read structure {path}"):
            load_structure(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value in a JSON value stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in inner for place in places(entry, (*path, key)))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
CONTENT = json.loads(json.dumps(structure_of().to_dict()))


@settings(max_examples=150)
@given(st.sampled_from(places(CONTENT)), json_values)
def test_a_file_with_any_one_value_changed_is_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], value: Any
) -> None:
    content = {"": json.loads(json.dumps(CONTENT))}
    *parents, last = ("", *place)
    holder: Any = content
    for key in parents:
        holder = holder[key]
    # JSON tells 1 from 1.0 and from true, which Python holds to be equal.
    if json.dumps(holder[last]) != json.dumps(value):
        holder[last] = value
        refused(tmp_path_factory.mktemp("changed") / "structure.json", json.dumps(content[""]))


def test_the_genome_of_a_loaded_structure_builds_the_network_it_describes(tmp_path: Path) -> None:
    structure = structure_of("mobilenet_v2", 20)
    structure.save(tmp_path / "structure.json")
    loaded = load_structure(tmp_path / "structure.json")
    widths_PL = loaded.space.widths(torch.tensor([loaded.genome]))
    assert [conv["out_channels"] for conv in loaded.convolutions] == widths_PL[0].tolist()
