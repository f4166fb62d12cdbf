import pytest
import torch

from engine.errors import UserError
from engine.memory import default_memory, free_memory, is_out_of_memory, parse_memory

CPU = torch.device("cpu")


def test_free_memory_is_there_and_less_than_what_can_be_addressed() -> None:
    assert 10**6 < free_memory(CPU) < 2**48
    assert 0 < default_memory(CPU) < free_memory(CPU)


def test_a_gpu_gives_scoring_more_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.memory.free_memory", lambda _: 1000)
    assert (default_memory(CPU), default_memory(torch.device("cuda"))) == (60, 250)


@pytest.mark.parametrize(
    ("text", "expected"), [("2G", 2 * 10**9), ("500M", 5 * 10**8), ("1.5gb", 15 * 10**8), ("64K", 64_000), ("7", 7)]
)
def test_amounts_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_memory(text, CPU) == expected


def test_a_percentage_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.memory.free_memory", lambda _: 1000)
    assert parse_memory("25%", CPU) == 250
    assert parse_memory("100%", CPU) == 1000


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "0%", "101%", "2T", "two", "1e9", "nan", "2 G B"])
def test_anything_else_is_refused_with_what_is_legal(text: str) -> None:
    with pytest.raises(UserError, match="--memory"):
        parse_memory(text, CPU)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**55)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("cin[0] is 0; legal values are 1..8"))
    assert not is_out_of_memory(ValueError("out of memory"))
