"""Which structures a step trains, and the loss it makes of their answers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from structures import names, random_genomes, space_of, tiny_space
from torch import Tensor

from engine.factored_sgd import FactoredSGD
from engine.pruningnet import PruningNet
from engine.run.optimizer import SGD
from engine.space.costs import cost_model
from engine.space.recipe import Recipe
from engine.step_recipe import BLOCK, Sampling, StepRecipe, random_structures, scale_to_macs

SMOOTHING = 0.1
seeds = st.integers(0, 2**32)


# -- structures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["widths", "macs"])
@given(seeds, st.integers(0, 5 * BLOCK), st.integers(1, 4))
def test_structures_depend_on_seed_and_step_alone(sampling: Sampling, seed: int, step: int, count: int) -> None:
    space = space_of("mobilenet_v1")
    one, other = (random_structures(space, sampling, count, seed) for _ in range(2))
    for earlier in (step + 3 * BLOCK, 0):
        other(earlier)
    assert torch.equal(one(step), other(step))
    assert torch.equal(space.check_genome(one(step)), one(step))
    assert len(one(step)) == count
    assert not torch.equal(one(step), one(step + 1))
    assert not torch.equal(one(step), random_structures(space, sampling, count, seed + 1)(step))


def drawn_macs(name: str, sampling: Sampling, seed: int, steps: int) -> Tensor:
    """Where the structures of some steps lie between the least and the full network's MACs, sorted."""
    space = space_of(name)
    costs, structures_of = cost_model(space), random_structures(space, sampling, 2, seed)
    genome_KG = torch.cat([structures_of(step) for step in range(steps)])
    ends_2G = torch.cat([space.uniform_choice(0), space.uniform_choice(space.choices - 1)])
    least, full = costs.macs(ends_2G).tolist()
    return ((costs.macs(genome_KG) - least).double() / (full - least)).sort().values


def distance_to_uniform(values_K: Tensor) -> float:
    """The statistic of Kolmogorov and Smirnov: the greatest difference of the distribution functions."""
    rank_K = torch.arange(len(values_K)) / len(values_K)
    return float(torch.maximum(values_K - rank_K, rank_K + 1 / len(values_K) - values_K).max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_structures_sampled_by_macs_are_uniform_in_macs_and_those_by_widths_are_not(name: str, seed: int) -> None:
    # Of 4000 uniform numbers one sample in a hundred is further away than 1.63 / sqrt(4000).
    by_macs = drawn_macs(name, "macs", seed, steps=2000)
    assert distance_to_uniform(by_macs) < 1.63 / 4000**0.5
    assert by_macs[0] < 0.002
    assert by_macs[-1] > 0.998
    assert distance_to_uniform(drawn_macs(name, "widths", seed, steps=500)) > 0.3


def test_structures_of_equal_macs_differ_in_every_gene() -> None:
    space = space_of("mobilenet_v1")
    costs, count = cost_model(space), 200
    rounding_KG = torch.rand(count, len(space.genes), generator=torch.Generator().manual_seed(0))
    genome_KG = scale_to_macs(costs, random_genomes(space, count), rounding_KG, torch.full((count,), 200e6).double())
    torch.testing.assert_close(costs.macs(genome_KG).double(), torch.full((count,), 200e6).double(), rtol=0.03, atol=0)
    assert (genome_KG.amax(0) - genome_KG.amin(0) > 15).all()


@given(names, seeds, st.floats(0, 1))
def test_a_genome_is_scaled_as_close_to_the_macs_as_any_point_of_its_ray(name: str, seed: int, share: float) -> None:
    space = space_of(name)
    costs, genome_1G = cost_model(space), random_genomes(space, 1, seed)
    rounding_1G = torch.rand(genome_1G.shape, generator=torch.Generator().manual_seed(seed))
    top = space.choices - 1
    target = share * costs.macs(space.uniform_choice(top)).double()
    point_P1 = torch.linspace(0, 2, 513)[:, None]
    ray_PG = torch.where(point_P1 < 1, genome_1G * point_P1, genome_1G + (top - genome_1G) * (point_P1 - 1))
    nearest = (costs.macs((ray_PG + rounding_1G).long().clamp(max=top)) - target).abs().min()
    found_1G = space.check_genome(scale_to_macs(costs, genome_1G, rounding_1G, target))
    assert (costs.macs(found_1G) - target).abs() <= nearest


@pytest.mark.parametrize("sampling", ["widths", "macs"])
@given(seeds, st.integers(0, 1000), st.integers(3, 6))
def test_a_sandwich_is_the_largest_the_smallest_and_random_ones(
    sampling: Sampling, seed: int, step: int, structures: int
) -> None:
    space = space_of("mobilenet_v1")
    recipe = StepRecipe(structures, sandwich=True, sampling=sampling)
    largest_G, smallest_G, *others = recipe.structures_of(space, seed)(step)
    assert (largest_G == space.choices - 1).all()
    assert (smallest_G == 0).all()
    assert torch.equal(torch.stack(others), random_structures(space, sampling, structures - 2, seed)(step))


# -- losses --------------------------------------------------------------------------------------------------------


def batch(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(classes, (12,), generator=generator)


def loss_by_hand(net: PruningNet, recipe: StepRecipe, genome_SG: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """A step's loss written out structure by structure, in plain PyTorch."""
    weights, count = net.generate(genome_SG), len(genome_SG)
    parts = [(images, labels)] * count
    if not recipe.sandwich:
        parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
    total, answers = torch.zeros((), dtype=images.dtype), None
    for s, (part, truth) in enumerate(parts):
        logits = net.logits(part, [weight[s] for weight in weights])
        if recipe.distill and s > 0:
            assert answers is not None
            total = total - (answers * logits.log_softmax(1)).sum(1).mean()
            continue
        answers = logits.detach().softmax(1)
        target = (1 - SMOOTHING) * F.one_hot(truth, net.space.classes).double() + SMOOTHING / net.space.classes
        total = total - (target * logits.log_softmax(1)).sum(1).mean()
    return total / count


@pytest.mark.parametrize(
    "recipe",
    [StepRecipe(1), StepRecipe(3), StepRecipe(3, sandwich=True), StepRecipe(4, sandwich=True, distill=True)],
    ids=["one", "three split a batch", "sandwich", "distillation"],
)
def test_a_step_is_that_of_the_loss_written_out_structure_by_structure(recipe: StepRecipe) -> None:
    net, plain_net = (PruningNet(tiny_space(), 4, torch.Generator().manual_seed(0)).double() for _ in range(2))
    sgd = Recipe(batch=12, epochs=1, lr=0.1, schedule="linear", weight_decay=1e-3)
    optimizer, plain = FactoredSGD(net, sgd), SGD(plain_net.named_parameters(), sgd)
    images, labels = batch(net.space.classes)
    genome_SG = recipe.structures_of(net.space, seed=1)(0)

    loss = recipe.losses(optimizer.logits(images, genome_SG, shared=recipe.sandwich), labels, SMOOTHING).sum()
    expected = loss_by_hand(plain_net, recipe, genome_SG, images, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, step in ((loss, optimizer), (expected, plain)):
        found.backward()
        step.step(0.1)
    torch.testing.assert_close(net.state_dict(), plain_net.state_dict(), rtol=1e-9, atol=1e-12)


def test_the_largest_structure_learns_from_the_labels_alone_and_the_others_from_its_answers_alone() -> None:
    logits_SnT = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    recipe = StepRecipe(3, sandwich=True, distill=True)

    def gradient(labels: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(recipe.losses(logits_SnT, labels, SMOOTHING).sum(), logits_SnT)
        return found

    first, second = gradient(torch.zeros(8).long()), gradient(torch.ones(8).long())
    (own,) = torch.autograd.grad(
        F.cross_entropy(logits_SnT[0], torch.zeros(8).long(), label_smoothing=SMOOTHING), logits_SnT
    )
    torch.testing.assert_close(first[0], own[0] / 3)
    assert torch.equal(first[1:], second[1:])
    answers_SnT = logits_SnT.detach().softmax(2)
    torch.testing.assert_close(first[1:], (answers_SnT[1:] - answers_SnT[0]) / (3 * 8))
