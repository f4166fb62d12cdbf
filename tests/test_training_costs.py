"""What training a PruningNet is said to take, against what it takes."""

from math import prod

import pytest
import torch
from structures import random_genomes, space_of, tiny_space
from test_factored_sgd import net_of, recipe
from torch import Tensor

from engine.factored_sgd import FactoredSGD, gradient_shapes
from engine.pruningnet import SHARED, PruningNet
from engine.training_costs import exchanged_bytes, parameter_bytes, step_bytes, steps_between_rests
from kernels import Recurrence


@pytest.mark.parametrize("hidden", [3, SHARED])
def test_the_memory_of_weights_momentum_and_average_is_four_bytes_a_parameter_each(hidden: int) -> None:
    parameters = sum(parameter.numel() for parameter in net_of(tiny_space(), hidden, torch.float32).parameters())
    assert parameter_bytes(tiny_space(), hidden) == 8 * parameters
    assert parameter_bytes(tiny_space(), hidden, averaged=True) == 12 * parameters
    assert parameter_bytes(tiny_space(), hidden, basis_momentum=torch.bfloat16) == 6 * parameters


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_the_memory_of_a_step_has_room_for_what_autograd_keeps_of_the_middle_structure_and_not_much_more(
    name: str,
) -> None:
    space = space_of(name, 10)
    optimizer = FactoredSGD(net_of(space, 1, torch.float32), recipe())
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randn(4, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = optimizer.logits(images, space.uniform_choice(space.choices // 2))
    assert logits.shape == (1, 4, 10)
    # The rest: copies of the weights, gradients, and what comes and goes.
    assert sum(kept.values()) <= step_bytes(space, batch=4, resolution=64) <= 3 * sum(kept.values())


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_what_ranks_exchange_in_a_step_is_about_what_the_gradients_of_random_structures_take(name: str) -> None:
    space = space_of(name, 1000)
    with torch.device("meta"):
        net = PruningNet(space, 1)
    shapes = gradient_shapes(net, net.widths(random_genomes(space, 100)))
    numbers = sum(prod(shape) for structure in shapes for shape in structure)
    assert exchanged_bytes(space, 100) == pytest.approx(4 * numbers, rel=0.15)


def test_the_slower_a_step_the_sooner_all_generators_are_brought_up_to_date() -> None:
    space = space_of("mobilenet_v2", 10)
    small, large, batch = (
        steps_between_rests("delayed", space, None, *size) for size in ((64, 32), (64, 224), (256, 32))
    )
    assert 1 < large < batch < small < Recurrence.LONGEST
    assert steps_between_rests("delayed", space, 1, 4096, 224) == 1
    assert steps_between_rests("immediate", space, None, 1, 32) == 1
    # A step reads and writes a third of the generators, and bringing all up to date may take a part in 16.
    assert steps_between_rests("delayed", space, 4096, 1, 32) == pytest.approx(3 * 16, rel=0.1)
