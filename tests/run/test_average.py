"""The average of the weights is what its formula says, and the module gets its own weights back."""

import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from engine.data import open_data
from engine.run.average import EVERY, WeightAverage
from engine.run.checkpoint import load_checkpoint
from engine.run.command import Interrupted
from engine.run.optimizer import SGD
from engine.run.training import TRAINED, WEIGHTS, Training, train
from engine.space.recipe import Recipe

DECAY, STEPS = 0.95, 2 * EVERY + 6


def weights_after(step: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step))


def averaged(decay: float, steps: int, last: int) -> tuple[nn.Linear, WeightAverage]:
    """A module after ``last`` of ``steps`` steps, and the average of its weights."""
    module = nn.Linear(4, 3, bias=False)
    average = WeightAverage(module, decay, steps)
    for done in range(1, last + 1):
        module.weight.data.copy_(weights_after(done))
        if average.due(done):
            average.take(done)
    return module, average


@pytest.mark.parametrize("decay", [1e-9, 0.5, 0.99, 1 - 1e-16])
@pytest.mark.parametrize("steps", [1, EVERY - 1, EVERY, EVERY + 1, 5 * EVERY, 5 * EVERY + 7])
def test_it_is_the_mean_of_the_weights_taken_so_far_by_powers_of_the_decay(decay: float, steps: int) -> None:
    for last in {steps // 2, steps}:
        taken = sorted({*range(EVERY, last + 1, EVERY), *([last] if last == steps else [])})
        _, average = averaged(decay, steps, last)
        assert bool(average.values) == bool(taken)
        if taken:
            shares = torch.tensor([decay ** (last - step) for step in taken], dtype=torch.float64)
            weights = torch.stack([weights_after(step).double() for step in taken])
            expected = (shares[:, None, None] * weights).sum(0) / shares.sum()
            torch.testing.assert_close(average.values["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_weights_before_training_have_no_part_in_it() -> None:
    module = nn.Linear(4, 3)
    nn.init.constant_(module.weight, torch.nan)
    average = WeightAverage(module, 0.99, EVERY)
    module.weight.data.copy_(weights_after(EVERY))
    average.take(EVERY)
    assert torch.equal(average.values["weight"], weights_after(EVERY))


def test_in_use_it_stands_in_for_the_weights_which_are_the_same_tensors_afterwards() -> None:
    module, average = averaged(0.9, steps=3 * EVERY, last=2 * EVERY + 1)
    own, mean = module.weight.data_ptr(), average.values["weight"].clone()
    with average.in_use():
        assert torch.equal(module.weight, mean)
    assert module.weight.data_ptr() == own
    assert torch.equal(module.weight, weights_after(2 * EVERY + 1))
    assert torch.equal(average.values["weight"], mean)


def test_before_there_is_an_average_the_module_keeps_its_weights() -> None:
    module, average = averaged(0.9, steps=EVERY, last=EVERY - 1)
    with average.in_use():
        assert torch.equal(module.weight, weights_after(EVERY - 1))


# -- in a training -------------------------------------------------------------------------------------------------


def trained(run: Path, decay: float | None, stop: int | None = None) -> tuple[Training, list[Tensor]]:
    """Train a classifier of digits from where it was stopped, to the end or `stop`; its weights after every step."""
    data = open_data("digits", resolution=None, device=torch.device("cpu"))
    recipe = Recipe(batch=8, epochs=1, lr=0.01, schedule="linear", weight_decay=0.0)
    run.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = nn.Linear(3 * 32 * 32, 10)
    weights: list[Tensor] = []

    def loss(images_NCHW: Tensor, labels_N: Tensor, step: int) -> Tensor:
        if step + 1 == stop:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(module(images_NCHW.flatten(1)), labels_N)

    def note() -> dict[str, float]:
        weights.append(module.weight.detach().clone())
        return {}

    training = Training(
        run=run, module=module, recipe=recipe, steps=STEPS, seed=0, data=data, images=data.subset("sub_train"),
        loss=loss, optimizer=SGD(module.named_parameters(), recipe), validate=note, validate_every=1, manifest={},
        checkpoint_minutes=10, tensorboard=False,
        average=None if decay is None else WeightAverage(module, decay, STEPS),
    )  # fmt: skip
    train(training, Console(quiet=True))
    return training, weights


def final_weights(run: Path, stem: str = WEIGHTS) -> Tensor:
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.tensors(stem)["weight"]


def test_a_training_trains_as_without_an_average_and_ends_with_the_average_of_what_it_trained(tmp_path: Path) -> None:
    _, plain = trained(tmp_path / "plain", None)
    training, weights = trained(tmp_path / "averaged", DECAY)
    assert all(torch.equal(one, other) for one, other in zip(plain, weights, strict=True))
    assert torch.equal(final_weights(tmp_path / "plain"), plain[-1])
    taken = (EVERY, 2 * EVERY, STEPS)
    shares = torch.tensor([DECAY ** (STEPS - step) for step in taken], dtype=torch.float64)
    expected = torch.einsum("s,soi->oi", shares / shares.sum(), torch.stack([weights[s - 1].double() for s in taken]))
    found = final_weights(tmp_path / "averaged")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found, weights[-1])
    assert list(training.tensors(STEPS)) == [WEIGHTS]


@pytest.mark.parametrize("stop", [EVERY - 1, EVERY, EVERY + 5, STEPS - 1])
def test_interrupted_and_resumed_a_training_ends_with_the_average_of_one_that_was_not(
    stop: int, tmp_path: Path
) -> None:
    _, weights = trained(tmp_path / "whole", DECAY)
    with pytest.raises(Interrupted):
        trained(tmp_path / "run", DECAY, stop)
    if stop >= EVERY:
        assert torch.equal(final_weights(tmp_path / "run", TRAINED), weights[stop - 1])
    _, later = trained(tmp_path / "run", DECAY)
    assert all(torch.equal(one, other) for one, other in zip(later, weights[stop:], strict=True))
    assert torch.equal(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))
