import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import genomes, random_genomes, space_of, tiny_space
from torch import Tensor

from engine.pruningnet import SHARED, PruningNet, count_parameters
from engine.space import IMAGE, Space, Width
from kernels import backends

ARCHITECTURES = ("mobilenet_v1", "mobilenet_v2", "resnet50")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=seeded())


# -- the definition, written out in plain PyTorch (MetaPruning, section 3.1) ----------------------------------------


def full_width_weights(net: PruningNet, genome: list[int]) -> list[Tensor]:
    """Generated weights ``[O, I, k, k]`` of every convolution of the unpruned network."""
    weights = []
    for layer, conv in enumerate(net.space.convs):
        generator = net.layer(layer)
        # A ratio is a float32 number, also where the weights are float64.
        ratios = torch.tensor([0.10 + 0.03 * genome[net.space.genes.index(gene)] for gene in conv.context])
        code = (generator.fc1.weight @ ratios.to(generator.bias.dtype) + generator.fc1.bias).relu()
        flat = generator.basis.reshape(-1, len(code)) @ code + generator.bias.flatten()
        weights.append(flat.reshape(len(generator.bias), -1, conv.kernel, conv.kernel))
    return weights


def cropped_weights(net: PruningNet, genome: list[int]) -> list[Tensor]:
    """Their first output and input channels, as many as the genome keeps."""
    space = net.space

    def channels(width: Width) -> int:
        return width if isinstance(width, int) else width.widths[genome[space.genes.index(width)]]

    return [
        weight[: channels(conv.cout), : 1 if conv.depthwise else channels(conv.cin)]
        for conv, weight in zip(space.convs, full_width_weights(net, genome), strict=True)
    ]


def plain_logits(net: PruningNet, images: Tensor, genome: list[int]) -> Tensor:
    """Training logits of one structure."""
    tensors = {IMAGE: images}
    for conv, weight in zip(net.space.convs, cropped_weights(net, genome), strict=True):
        groups = len(weight) if conv.depthwise else 1
        x = F.conv2d(tensors[conv.source], weight, None, conv.stride, conv.kernel // 2, groups=groups)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        if conv.shortcut:
            x = x + tensors[conv.shortcut]
        x = {"relu": x.relu(), "relu6": x.clamp(0, 6), "none": x}[conv.activation]
        tensors[conv.name] = F.max_pool2d(x, 3, 2, 1) if conv.max_pool else x
    features = tensors[net.space.convs[-1].name].mean((2, 3))
    return features @ net.classifier.weight[:, : features.shape[1]].T + net.classifier.bias


# -- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("mobilenet_v1", 106.1), ("mobilenet_v2", 242.0), ("resnet50", 776.1)])
def test_a_pruningnet_of_the_papers_hidden_sizes_has_the_papers_parameters(name: str, millions: float) -> None:
    # The sum over the layers of (c + 1) h + n (h + 1), for c context ratios, hidden size h and n weights.
    assert count_parameters(space_of(name)) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("hidden", [None, SHARED, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parameters_counted_are_those_of_the_network_that_is_built(name: str, hidden: int | None) -> None:
    space = space_of(name, 7)
    net = PruningNet(space, hidden, device="meta")
    assert count_parameters(space, hidden) == sum(parameter.numel() for parameter in net.parameters())


def test_the_same_generator_draws_the_same_network_and_another_a_different_one() -> None:
    first, again, other = (PruningNet(tiny_space(), generator=seeded(seed)).state_dict() for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])


def test_initial_weights_have_the_spread_of_a_linear_layer() -> None:
    # torch.nn.Linear draws weights and biases uniformly within 1 / sqrt(inputs): the codes' size, for the basis.
    layer = PruningNet(tiny_space(), hidden=16, generator=seeded()).layer(5)
    for parameter, bound in ((layer.basis, 16**-0.5), (layer.bias, 16**-0.5), (layer.fc1.weight, 1.0)):
        assert 0.8 * bound < parameter.abs().max() <= bound


def test_shared_weights_start_as_a_convolution_does() -> None:
    # torch.nn.Conv2d draws uniformly within 1 / sqrt(inputs): 20 channels of 3 × 3 taps.
    layer = PruningNet(tiny_space(), SHARED, seeded()).layer(5)
    assert 0.9 * 180**-0.5 < layer.bias.abs().max() <= 180**-0.5


# -- weights -------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 5))
def test_generated_weights_are_crops_of_those_of_full_width(data: st.DataObject, subnetworks: int) -> None:
    space = tiny_space()
    net = PruningNet(space, generator=seeded())
    genome_SG = torch.cat([data.draw(genomes(space)) for _ in range(subnetworks)])
    generated = net.generate(genome_SG)
    for s, genome in enumerate(genome_SG.tolist()):
        for layer, expected in enumerate(cropped_weights(net, genome)):
            torch.testing.assert_close(generated[layer][s], expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 5), st.sampled_from([None, SHARED, 5]))
def test_codes_of_all_convolutions_have_the_bits_and_gradients_of_each_alone(
    structures: int, hidden: int | None
) -> None:
    space = tiny_space()
    together, alone = (PruningNet(space, hidden, seeded()) for _ in range(2))
    genome_SG = random_genomes(space, structures)
    found = together.all_codes(genome_SG)
    expected = [alone.codes(layer, genome_SG) for layer in range(len(space.convs))]
    grads = [torch.randn(code_SH.shape, generator=seeded()) for code_SH in found]
    for codes in (found, expected):
        torch.autograd.backward(codes, grads)
    for layer, code_SH in enumerate(found):
        assert torch.equal(code_SH, expected[layer])
        assert code_SH.is_contiguous()
        for name, parameter in alone.layer(layer).fc1.named_parameters():
            torch.testing.assert_close(together.layer(layer).fc1.get_parameter(name).grad, parameter.grad)


def test_two_choices_of_equal_width_still_have_different_weights() -> None:
    # 10 · 10 % and 10 · 13 % both truncate to one channel; the PruningNet is told the ratio, not the width.
    space = tiny_space()
    genome_SG = torch.tensor([[0, 30, 30], [1, 30, 30]])
    assert space.widths(genome_SG)[:, 0].tolist() == [1, 1]
    first, second = PruningNet(space, generator=seeded()).generate(genome_SG)[0]
    assert not torch.equal(first, second)


@given(st.data(), st.integers(1, 3))
def test_shared_weights_are_crops_of_one_tensor_whatever_the_structure(data: st.DataObject, subnetworks: int) -> None:
    space = tiny_space()
    net = PruningNet(space, SHARED, seeded())
    genome_SG = torch.cat([data.draw(genomes(space)) for _ in range(subnetworks)])
    for layer, weights in enumerate(net.generate(genome_SG)):
        for weight in weights:
            out_channels, in_channels = weight.shape[:2]
            crop = net.layer(layer).bias[:out_channels, :in_channels]
            assert torch.equal(weight.flatten(2), crop)
    assert all("fc1" in name or "basis" in name for name, tensor in net.state_dict().items() if not tensor.numel())


def poison_outside(net: PruningNet, genome: list[int]) -> None:
    """Overwrite every weight the structure does not use with NaN."""
    with torch.no_grad():
        for layer, weight in enumerate(cropped_weights(net, genome)):
            outside = torch.ones_like(net.layer(layer).bias, dtype=torch.bool)
            outside[: weight.shape[0], : weight.shape[1]] = False
            net.layer(layer).bias[outside] = torch.nan
            net.layer(layer).basis[outside] = torch.nan


@given(genomes(tiny_space()), st.sampled_from(["auto", "reference"]))
def test_what_lies_outside_the_crop_is_never_read(genome_SG: Tensor, backend: str) -> None:
    space = tiny_space()
    net, poisoned = (PruningNet(space, generator=seeded()) for _ in range(2))
    poison_outside(poisoned, genome_SG[0].tolist())
    logits, gradients = [], []
    with backends.use(backend):
        for each in (net, poisoned):
            logits.append(each(random_images(4), genome_SG))
            gradients.append(torch.autograd.grad(logits[-1].square().sum(), list(each.parameters())))
    assert torch.equal(*logits)
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)


# -- the training forward and its gradient -------------------------------------------------------------------------


@given(st.data(), st.integers(1, 4), st.integers(33, 40))
def test_k_structures_give_the_logits_of_k_passes_over_their_images(
    data: st.DataObject, structures: int, side: int
) -> None:
    space = tiny_space()
    net = PruningNet(space, generator=seeded()).double()
    genome_SG = torch.cat([data.draw(genomes(space)) for _ in range(structures)])
    # 13 images in K parts, the first ones larger: 13; 7, 6; 5, 4, 4; 4, 3, 3, 3.
    images = random_images(13, side).double()
    bounds = {1: [0, 13], 2: [0, 7, 13], 3: [0, 5, 9, 13], 4: [0, 4, 7, 10, 13]}[structures]
    apart = [net(images[bounds[s] : bounds[s + 1]], genome_SG[s][None]) for s in range(structures)]
    torch.testing.assert_close(net(images, genome_SG), torch.cat(apart), rtol=1e-7, atol=1e-9)


def checked_against_plain(space: Space, genome_SG: Tensor, images: Tensor, hidden: int | None) -> None:
    """Assert logits and all gradients of a float64 PruningNet equal those of the plain implementation."""
    net = PruningNet(space, hidden, generator=seeded()).double()
    images = images.double()
    parts = images.tensor_split(len(genome_SG))
    logits = net(images, genome_SG)
    expected = torch.cat([plain_logits(net, *pair) for pair in zip(parts, genome_SG.tolist(), strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-7, atol=1e-9)
    labels = torch.arange(len(images)) % space.classes
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(logits, labels), list(parameters.values()))
    wanted = torch.autograd.grad(F.cross_entropy(expected, labels), list(parameters.values()))
    for name, gradient, plain in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-6, atol=1e-9, msg=name)


@settings(max_examples=15)
@given(st.data(), st.integers(1, 3))
def test_logits_and_gradients_are_those_of_the_plain_implementation(data: st.DataObject, structures: int) -> None:
    genome_SG = torch.cat([data.draw(genomes(tiny_space())) for _ in range(structures)])
    checked_against_plain(tiny_space(), genome_SG, random_images(9), hidden=None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_as_the_plain_implementation_does(name: str) -> None:
    space = space_of(name, 7)
    checked_against_plain(space, random_genomes(space, 1), random_images(4), hidden=1)


def test_single_precision_agrees_with_double() -> None:
    space = tiny_space()
    net = PruningNet(space, generator=seeded())
    genome_SG, images = random_genomes(space, 2), random_images(16)
    logits = net(images, genome_SG)
    torch.testing.assert_close(logits.double(), net.double()(images.double(), genome_SG), rtol=1e-3, atol=1e-4)


def test_the_gradient_reaches_all_that_the_crop_holds_and_nothing_beyond() -> None:
    space, genome = tiny_space(), [20, 12, 25]
    # Sixteen hidden units, so that in no layer ReLU switches all of them off.
    net = PruningNet(space, hidden=16, generator=seeded())
    F.cross_entropy(net(random_images(8), torch.tensor([genome])), torch.arange(8) % 5).backward()
    for layer, weight in enumerate(cropped_weights(net, genome)):
        generator = net.layer(layer)
        inside = torch.zeros_like(generator.bias, dtype=torch.bool)
        inside[: weight.shape[0], : weight.shape[1]] = True
        assert generator.bias.grad is not None
        assert torch.equal(generator.bias.grad != 0, inside)
        assert generator.basis.grad is not None
        assert torch.equal(generator.basis.grad.abs().sum(-1) > 0, inside)
        assert generator.fc1.weight.grad is not None
        assert generator.fc1.weight.grad.any()
    for parameter in net.classifier.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()
