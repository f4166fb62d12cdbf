"""A training step on the Triton kernels, forward, backward and factors, against the same step without any kernel.

Run by test_parity.py beside parity.py. The kernels are registered for CPU tensors as `kernels.backends` registers them
for a GPU's: the step takes the path that it takes there, through autograd.
"""

from collections.abc import Callable, Iterator
from typing import Any

import parity
import pytest
import ragged
import torch
import torch.nn.functional as F
from structures import random_genomes, tiny_space
from test_factored_sgd import net_of, recipe

from engine.factored_sgd import FactoredSGD
from kernels import backends
from kernels.registration import NAMESPACE, REFERENCE_NAMESPACE, overload

FORWARD = ("ragged_conv", "ragged_depthwise", "ragged_max_pool", "ragged_normalise")
EXPECTED = {"generate_weights", "update_generators_", *FORWARD, *(f"{op}_backward" for op in FORWARD)}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The ops whose Triton kernel ran. Ops that have none are their references, as on a GPU."""
    names: set[str] = set()

    def kernel(op: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            names.add(op)
            return ragged.moved(parity.LAUNCHERS[op](*ragged.moved(args, parity.DEVICE)), "cpu")

        return run

    def chosen(op: str, *_: Any) -> str:
        return "triton" if backends._choice == "auto" and op in parity.LAUNCHERS else "reference"

    def implementation(op: str, like: torch.Tensor) -> Callable[..., Any]:
        return overload(NAMESPACE if chosen(op) == "triton" else REFERENCE_NAMESPACE, op)

    library = torch.library.Library(NAMESPACE, "IMPL")
    for op in parity.TRITON_OPS:
        # One of them is composed of others on a CPU.
        library.impl(op, kernel(op), "CPU", allow_override=True)
    monkeypatch.setattr(backends, "chosen", chosen)
    monkeypatch.setattr(backends, "implementation", implementation)
    yield names
    library._destroy()


def trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights and momentum after a step of two structures, and their logits before it."""
    space = tiny_space()
    net = net_of(space, None, dtype)
    optimizer = FactoredSGD(net, recipe())
    images, labels = torch.randn(4, 3, 18, 17, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    logits = optimizer.logits(images.to(dtype), random_genomes(space, 2, seed=3)).flatten(0, 1)
    F.cross_entropy(logits, labels).backward()
    optimizer.step(0.1)
    momentum = {f"momentum of {name}": value for name, value in optimizer.momentum().items()}
    return {"logits": logits.detach(), **net.state_dict(), **momentum}


def test_a_training_step_is_as_exact_as_that_of_torch(called: set[str]) -> None:
    found = trained(torch.float32)
    assert called == EXPECTED
    with backends.use("reference"):
        in_torch, exact = trained(torch.float32), trained(torch.float64)
    assert called == EXPECTED
    for name, wanted in exact.items():
        largest = ragged.largest(wanted)
        luck = 1e-6 * (1 + largest)
        assert ragged.error(found[name], wanted) <= 2 * ragged.error(in_torch[name], wanted) + luck, name
