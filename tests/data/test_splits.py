import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import Splits, index_batches
from engine.data.splits import make_splits
from engine.errors import UserError

class_sizes = st.lists(st.integers(3, 60), min_size=1, max_size=6)


def labels_of(sizes: list[int]) -> list[int]:
    return [label for label, size in enumerate(sizes) for _ in range(size)]


def names_of(sizes: list[int]) -> list[str]:
    return [f"class {label}" for label in range(len(sizes))]


@settings(deadline=None)
@given(class_sizes, st.integers(0, 2**31))
def test_splits_are_disjoint_cover_everything_and_are_stratified(sizes: list[int], seed: int) -> None:
    labels = labels_of(sizes)
    splits = make_splits(labels, names_of(sizes), seed=seed)
    assert sorted(splits.members) == list(range(len(labels)))
    held_out = -(-len(labels) // 5)
    assert len(splits.test) == len(splits.sub_validation) == held_out
    for label, size in enumerate(sizes):
        for part in (splits.test, splits.sub_validation):
            share = sum(labels[index] == label for index in part)
            assert abs(share - held_out * size / len(labels)) < 1
        assert any(labels[index] == label for index in splits.sub_train)


@settings(deadline=None)
@given(class_sizes, st.integers(0, 2**31), st.data())
def test_official_test_images_and_quarantined_images_stay_where_they_belong(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    labels = labels_of(sizes) + labels_of([2] * len(sizes))
    official = range(sum(sizes), len(labels))
    excluded = {data.draw(st.sampled_from(official)), 0}
    splits = make_splits(labels, names_of(sizes), official_test=official, excluded=excluded, seed=seed)
    assert set(splits.test) == set(official) - excluded
    assert set(splits.members) == set(range(len(labels))) - excluded


def test_the_same_seed_gives_the_same_splits_and_another_seed_others() -> None:
    sizes = [40, 60]
    first, again, other = (make_splits(labels_of(sizes), names_of(sizes), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.digest == again.digest
    assert first.sub_train != other.sub_train


def test_splits_of_a_seed_never_change_between_versions() -> None:
    # By definition: in the order of the numbers that (seed, index) draws, one of 5 is test, one validation.
    splits = make_splits([0] * 5, ["only"], seed=0)
    assert (splits.test, splits.sub_validation, splits.sub_train) == ((1,), (2,), (0, 3, 4))


def test_large_classes_give_fifty_images_each_to_sub_validation() -> None:
    sizes = [500, 700]
    official = range(1200, 1204)
    splits = make_splits([*labels_of(sizes), 0, 0, 1, 1], names_of(sizes), official_test=official)
    assert sum(index < 500 for index in splits.sub_validation) == 50
    assert len(splits.sub_validation) == 100
    assert len(splits.sub_train) == 1100


def test_a_class_of_two_images_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'class 1' has 2 usable images; give it at least 3"):
        make_splits(labels_of([9, 2]), names_of([9, 2]))


def test_splits_survive_a_file_and_refuse_a_changed_one(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    splits = make_splits(labels_of([9, 8]), names_of([9, 8]), fingerprint="of the data", files=("a.png:7",))
    splits.save(path)
    assert Splits.load(path) == splits
    assert list(tmp_path.iterdir()) == [path]

    stored = json.loads(path.read_text())
    stored["sub_train"].append(stored["test"].pop())
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="does not match its digest"):
        Splits.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Splits.load(path)
    with pytest.raises(UserError, match="cannot read"):
        Splits.load(tmp_path / "nowhere.json")


def test_an_image_in_two_splits_is_refused() -> None:
    with pytest.raises(UserError, match="overlap"):
        Splits(sub_train=(0, 1), sub_validation=(2,), test=(1,), seed=0, fingerprint="")


def test_a_changed_tree_is_described_by_the_files_that_changed() -> None:
    splits = Splits((0,), (1,), (2,), seed=0, fingerprint="old", files=("a:1", "b:1", "c:1"))
    with pytest.raises(UserError, match="missing 'b', added 'd', changed 'c'"):
        splits.verify("new", 3, ("a:1", "c:2", "d:1"))


def test_an_index_beyond_the_data_is_refused() -> None:
    splits = Splits((0,), (1,), (7,), seed=0, fingerprint="same")
    with pytest.raises(UserError, match="beyond the 3 images"):
        splits.verify("same", 3, ())


@settings(deadline=None)
@given(class_sizes, st.integers(1, 4), st.integers(0, 2**31))
def test_a_group_is_never_divided_and_groups_are_split_as_single_images_are(
    sizes: list[int], copies: int, seed: int
) -> None:
    labels, count = labels_of(sizes), sum(sizes)
    alone = make_splits(labels, names_of(sizes), seed=seed)
    grouped = make_splits(labels * copies, names_of(sizes), seed=seed, groups=[*range(count)] * copies)
    for name in ("sub_train", "sub_validation", "test"):
        expected = [copy * count + index for copy in range(copies) for index in getattr(alone, name)]
        assert list(getattr(grouped, name)) == expected


def test_a_group_loses_its_quarantined_images_and_no_other() -> None:
    splits = make_splits([0] * 20, ["only"], groups=[*range(10)] * 2, excluded=[3, 4, 14])
    assert set(splits.members) == set(range(20)) - {3, 4, 14}


def test_groups_that_no_split_could_keep_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        make_splits([0, 1] * 5, ["a", "b"], groups=[0] * 10)
    with pytest.raises(ValueError, match="official test part"):
        make_splits([0] * 10, ["a"], groups=[*range(5)] * 2, official_test=[9])


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 9), st.integers(0, 40))
def test_batches_resume_exactly_at_any_step(count: int, batch_size: int, seed: int, start: int) -> None:
    whole = [batch.tolist() for batch in index_batches(count, batch_size, seed, 0, start + 5)]
    resumed = [batch.tolist() for batch in index_batches(count, batch_size, seed, start, 5)]
    assert resumed == whole[start:]
    assert all(len(batch) == min(batch_size, count) for batch in whole)


def test_an_epoch_visits_no_image_twice_and_the_next_one_in_another_order() -> None:
    batches = [batch.tolist() for batch in index_batches(10, 3, 0, 0, 6)]
    first, second = (list(chain.from_iterable(epoch)) for epoch in (batches[:3], batches[3:]))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="0 images in batches of 8"):
        next(index_batches(0, 8, 0, 0, 1))
