"""FactoredSGD against plain autograd and torch.optim.SGD."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structures import random_genomes, space_of, tiny_space
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.factored_sgd import FactoredSGD
from engine.pruningnet import SHARED, PruningNet
from engine.run.optimizer import SGD, Optimizer
from engine.space import Space
from engine.space.recipe import Recipe
from kernels import Recurrence, backends

STEPS_SIDE_BY_SIDE = 10


def recipe() -> Recipe:
    return Recipe(batch=6, epochs=1, lr=0.1, schedule="linear", weight_decay=1e-3)


def net_of(space: Space, hidden: int | None, dtype: torch.dtype) -> PruningNet:
    return PruningNet(space, hidden, torch.Generator().manual_seed(0)).to(dtype)


def optimizer_of(net: PruningNet, factored: bool, delay: int = 1) -> Optimizer:
    return FactoredSGD(net, recipe(), delay) if factored else SGD(net.named_parameters(), recipe())


def batch(space: Space, step: int, side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, side, side, generator=generator)
    return images, torch.randint(space.classes, (6,), generator=generator)


def train(net: PruningNet, optimizer: Optimizer, steps: range, structures: int = 1) -> list[float]:
    """Losses of some steps, each with structures of its own; plainly where the optimizer knows no better."""
    losses = []
    for step in steps:
        images, labels = batch(net.space, step)
        logits = optimizer.logits if isinstance(optimizer, FactoredSGD) else net
        found = logits(images.to(net.precision), random_genomes(net.space, structures, step)).reshape(len(labels), -1)
        loss = F.cross_entropy(found, labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step(0.1 * (1 - step / 50))
        losses.append(loss.item())
    return losses


def trained(
    space: Space,
    hidden: int | None,
    dtype: torch.dtype,
    steps: int,
    *,
    factored: bool,
    structures: int = 1,
    delay: int = 1,
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, weights and momentum."""
    net = net_of(space, hidden, dtype)
    optimizer = optimizer_of(net, factored, delay)
    losses = train(net, optimizer, range(steps), structures)
    optimizer.settle()
    return losses, net.state_dict(), optimizer.momentum()


@pytest.mark.parametrize("delay", [1, 8])
@pytest.mark.parametrize(("structures", "hidden"), [(1, None), (3, None), (3, SHARED)])
def test_fifty_steps_are_those_of_plain_autograd_and_sgd(structures: int, hidden: int | None, delay: int) -> None:
    found, expected = (
        trained(tiny_space(), hidden, torch.float64, 50, factored=factored, structures=structures, delay=delay)
        for factored in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_every_step_of_mobilenet_v1_is_that_of_plain_autograd_and_sgd() -> None:
    # Step by step, from where the other is: on six images, BatchNorm makes a difference grow some 300 times a step.
    net, plain_net = (net_of(space_of("mobilenet_v1", 10), 3, torch.float64) for _ in range(2))
    optimizer, plain = FactoredSGD(net, recipe()), SGD(plain_net.named_parameters(), recipe())
    for step in range(STEPS_SIDE_BY_SIDE):
        plain_net.load_state_dict(net.state_dict())
        plain.restore({name: buffer.clone() for name, buffer in optimizer.momentum().items()})
        found = train(net, optimizer, range(step, step + 1))
        expected = train(plain_net, plain, range(step, step + 1))
        assert found == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(net.state_dict(), plain_net.state_dict(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(optimizer.momentum(), plain.momentum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_single_precision_stays_as_close_to_double_as_plain_training_does(backend: str, delay: int) -> None:
    space = tiny_space()
    _, exact, _ = trained(space, None, torch.float64, 5, factored=False)
    _, plain, _ = trained(space, None, torch.float32, 5, factored=False)
    with backends.use(backend):
        _, found, _ = trained(space, None, torch.float32, 5, factored=True, delay=delay)

    def error(weights: dict[str, Tensor]) -> float:
        return max(float((weights[name].double() - exact[name]).abs().max()) for name in exact)

    assert error(found) <= 2 * error(plain) + 1e-6


def test_no_gradient_of_a_basis_is_ever_made() -> None:
    net = net_of(tiny_space(), None, torch.float32)
    optimizer = FactoredSGD(net, recipe())
    images, labels = batch(net.space, 0)
    F.cross_entropy(optimizer.logits(images, random_genomes(net.space, 1))[0], labels).backward()
    assert all(parameter.grad is None for parameter in optimizer.generated.values())
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    optimizer.step(0.1)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters() if "bias" in name)


def test_its_momentum_is_that_of_plain_sgd_by_name_and_either_continues_the_other() -> None:
    space = tiny_space()

    def continued(first: bool, second: bool) -> dict[str, Tensor]:
        net = net_of(space, None, torch.float64)
        early, late = optimizer_of(net, first), optimizer_of(net, second)
        train(net, early, range(4))
        late.restore(early.momentum())
        train(net, late, range(4, 8))
        return late.momentum() | net.state_dict()

    results = [continued(first, second) for first in (True, False) for second in (True, False)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-11)


def test_restored_momentum_continues_bit_for_bit() -> None:
    through = net_of(tiny_space(), None, torch.float32)
    optimizer = FactoredSGD(through, recipe())
    train(through, optimizer, range(6))

    again = net_of(tiny_space(), None, torch.float32)
    first, second = FactoredSGD(again, recipe()), FactoredSGD(again, recipe())
    train(again, first, range(3))
    second.restore({name: buffer.clone() for name, buffer in first.momentum().items()})
    train(again, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("delay", [1, 4])
def test_momentum_in_bfloat16_rounds_what_is_kept_of_the_bases_and_continues_bit_for_bit(delay: int) -> None:
    exact, through, again = (net_of(tiny_space(), None, torch.float32) for _ in range(3))
    train(exact, single := FactoredSGD(exact, recipe(), delay), range(delay))
    train(through, half := FactoredSGD(through, recipe(), delay, basis_momentum=torch.bfloat16), range(delay))
    bases = {name for name in half.generated if name.endswith(".basis")}
    rounded = {name: m.bfloat16() if name in bases else m for name, m in single.momentum().items()}
    if delay == 1:
        # Not yet read, it has changed nothing.
        torch.testing.assert_close(through.state_dict(), exact.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(half.momentum(), rounded, rtol=0, atol=0)
    assert {name: m.dtype for name, m in half.momentum().items()} == {name: m.dtype for name, m in rounded.items()}

    train(through, half, range(delay, 3 * delay))
    train(again, first := FactoredSGD(again, recipe(), delay, basis_momentum=torch.bfloat16), range(2 * delay))
    second = FactoredSGD(again, recipe(), delay, basis_momentum=torch.bfloat16)
    second.restore({name: buffer.clone() for name, buffer in first.momentum().items()})
    train(again, second, range(2 * delay, 3 * delay))
    torch.testing.assert_close(again.state_dict(), through.state_dict(), rtol=0, atol=0)


class Crossings(TorchDispatchMode):
    """Notes every operation that takes tensors, not single numbers, of the host and of another device.

    What is made of a list on that device it does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.dim()]
        if len({t.device for t in leaves}) > 1:
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize("delay", [1, 2])
def test_a_step_reads_nothing_from_the_device_and_takes_genomes_widths_and_drifts_there_once(
    delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors without values, whose reading fails, in place of those of a GPU; as if every op had a kernel for them.
    monkeypatch.setattr(backends, "chosen", lambda *_: "triton")
    backends._implementation.cache_clear()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda _: None)
    net = PruningNet(tiny_space(), device="meta")
    optimizer = FactoredSGD(net, recipe(), delay)
    images, labels = torch.empty(6, 3, 32, 32, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    for step in range(delay + 1):
        with Crossings() as crossings:
            one_step(optimizer, images, labels, step)
        # At rest again the drifts are there already.
        assert crossings.seen == ["aten._to_copy.default"] * (2 if step == delay else 3)
    backends._implementation.cache_clear()


def one_step(optimizer: FactoredSGD, images: Tensor, labels: Tensor, step: int) -> None:
    logits = optimizer.logits(images, random_genomes(optimizer.net.space, 3, step))
    F.cross_entropy(logits.flatten(0, 1), labels).backward()
    optimizer.step(0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    net = PruningNet(tiny_space(), generator=torch.Generator().manual_seed(0), device="cuda")
    optimizer = FactoredSGD(net, recipe())
    images, labels = (tensor.cuda() for tensor in batch(net.space, 0))
    one_step(optimizer, images, labels, 0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(optimizer, images, labels, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_no_structure_uses_waits_until_the_optimizer_rests_some_steps_after_it_last_did() -> None:
    net = net_of(tiny_space(), None, torch.float64)
    optimizer = FactoredSGD(net, recipe(), delay=4)
    waited, rests = [], []
    for step in range(10):
        before = {name: parameter.clone() for name, parameter in optimizer.generated.items()}
        train(net, optimizer, range(step, step + 1))
        unchanged = [(after == before[name]).any().item() for name, after in optimizer.generated.items()]
        waited.append(any(unchanged))
        rests.append(optimizer.at_rest)
        if step == 5:
            optimizer.settle()
            assert optimizer.at_rest
    assert rests == [step in (3, 9) for step in range(10)]
    assert waited == [not rested for rested in rests]


def test_driven_by_the_same_gradients_delayed_and_immediate_updates_stay_together_in_single_precision() -> None:
    # With gradients of their own they would not: BatchNorm makes a difference grow some 300 times a step.
    space = tiny_space()
    nets = [net_of(space, None, torch.float32) for _ in range(2)]
    immediate, delayed = (FactoredSGD(net, recipe(), delay) for net, delay in zip(nets, (1, 7), strict=True))
    for step in range(40):
        images, labels = batch(space, step)
        logits, others = (each.logits(images, random_genomes(space, 3, step)) for each in (immediate, delayed))
        torch.testing.assert_close(others, logits, rtol=1e-3, atol=1e-3)
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
        driving, driven = (
            [*each.weights, *(leaf for pair in each.classifiers for leaf in pair)] for each in (immediate, delayed)
        )
        for leaf, other in zip(driving, driven, strict=True):
            assert leaf.grad is not None
            other.grad = leaf.grad.clone()
        for each in (immediate, delayed):
            each.step(0.1 * (1 - step / 50))
    delayed.settle()
    found, wanted = (
        {**net.state_dict(), **{f"momentum of {name}": m for name, m in each.momentum().items()}}
        for net, each in zip(nets[::-1], (delayed, immediate), strict=True)
    )
    for name, expected in wanted.items():
        assert (found[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("delay", [0, Recurrence.LONGEST + 1])
def test_it_rests_before_it_can_no_longer_tell_when_rows_were_written(delay: int) -> None:
    with pytest.raises(ValueError, match=rf"delay is {delay}; legal values are 1\.\.255"):
        FactoredSGD(net_of(tiny_space(), 1, torch.float32), recipe(), delay)


def test_settled_and_restored_a_delayed_update_continues_bit_for_bit() -> None:
    through = net_of(tiny_space(), None, torch.float32)
    optimizer = FactoredSGD(through, recipe(), delay=4)
    train(through, optimizer, range(6))
    optimizer.settle()
    train(through, optimizer, range(6, 12))

    again = net_of(tiny_space(), None, torch.float32)
    first, second = (FactoredSGD(again, recipe(), delay=4) for _ in range(2))
    train(again, first, range(6))
    first.settle()
    second.restore({name: buffer.clone() for name, buffer in first.momentum().items()})
    train(again, second, range(6, 12))
    for one in (optimizer, second):
        one.settle()
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), again.parameters(), strict=True))
