import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.files import read_json, sha256_file, sha256_json, write_atomically


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_at_any_step_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync", fail), "replace": (Path, "replace", fail)}[step])
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_content_until_the_new_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.read_text()))
    write_atomically(path, "new")
    # The file is synced before the rename, its folder after it.
    assert seen == ["old", "new"]


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def test_the_digest_of_json_is_that_of_its_canonical_form() -> None:
    canonical = b'{"a":[1,2.5,null,true],"b":"\\u00e9"}'
    assert sha256_json({"b": "é", "a": [1, 2.5, None, True]}) == hashlib.sha256(canonical).hexdigest()


@given(json_values)
def test_the_digest_of_json_survives_a_file_and_the_order_of_keys(value: Any) -> None:
    assert sha256_json(json.loads(json.dumps({"value": value}, indent=2))) == sha256_json({"value": value})
    if isinstance(value, dict):
        assert sha256_json(dict(reversed(value.items()))) == sha256_json(value)


@given(json_values, json_values)
def test_values_that_are_written_differently_have_different_digests(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_json(one) == sha256_json(other)) == same


@given(st.dictionaries(st.text(), json_values))
def test_an_object_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    write_atomically(path, json.dumps(value))
    assert read_json(path, "file") == value


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_bytes(content)
    refusal = ""
    try:
        read_json(path, "manifest")
    except UserError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1


@pytest.mark.parametrize(
    "content", [b"{} {}", b"{'a': 1}", b"[" * 100_000, b'{"a": ' + b"7" * 5000 + b"}", b"\xef\xbb\xbf{}"]
)
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no manifest: not valid JSON"):
        read_json(path, "manifest")


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read manifest {tmp_path}/none: No such file"):
        read_json(tmp_path / "none", "manifest")
    with pytest.raises(UserError, match=f"cannot read manifest {tmp_path}: Is a directory"):
        read_json(tmp_path, "manifest")
