"""The fixture that runs a test in every implementation of an op that this processor can run."""

from collections.abc import Iterator

import pytest

from kernels import backends

INSTRUCTION_SETS = [] if backends.extension is None else backends.extension.build_info()["instruction_sets"]


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the reference, and on the C++ kernel of the module's `OP` in every instruction set."""
    if request.param == "reference":
        with backends.use("reference"):
            yield request.param
        return
    if reason := backends.why_not(request.module.OP, "cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("METAPRUNE_ISA", request.param)
    with backends.use("cpu"):
        yield request.param
