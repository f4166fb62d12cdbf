"""What scoring and meta-training are compared with: the original implementation's way, and the best of PyTorch.

Legend: G genes, N images, C channels, H W size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.population import ScoringImages
from engine.pruned import ConvBlock, PrunedNet
from engine.pruningnet import PruningNet
from engine.space.recipe import Recipe
from engine.space.structure import convolutions

# Freezing makes the weights constants, so that oneDNN packs them ahead of time and takes activations and shortcuts into
# the convolutions. Autotuning has little to choose from: oneDNN's convolutions have no rival. A C++ wrapper saves the
# Python between the kernels, which a batch of a few images hides.
INDUCTOR = {"freezing": True}


@torch.no_grad()
def score_the_papers_way(
    net: PruningNet, genome_G: Tensor, images: ScoringImages, batch: int = 64, momentum: float = 0.1
) -> int:
    """Correct images of one candidate, computed as the original implementation of MetaPruning does.

    For every batch, of calibration and of scoring, the weights of all layers are generated anew at full width and
    cropped. BatchNorm is calibrated in training mode, by running statistics over the calibration batches.
    Contiguous NCHW, eager, the precision of the PruningNet.

    With one batch and ``momentum`` 1 this is the score as `engine.population` defines it, but for the running
    variance, which is n / (n - 1) times that of the n values of a channel.
    """
    network = PrunedNet(convolutions(net.space, genome_G), net.space.classes).to(net.classifier.weight.device)
    _crop_classifier(net, network)
    blocks = _blocks(network)
    for block in blocks:
        block.norm.momentum = momentum

    def logits(images_NCHW: Tensor) -> Tensor:
        for index, block in enumerate(blocks):
            block.conv.weight.data = _full_size_then_cropped(net, index, genome_G, *block.conv.weight.shape[:2])
        return network(images_NCHW)

    network.train()
    for images_NCHW in images.calibration_NCHW.split(batch):
        logits(images_NCHW)
    network.eval()
    correct = 0
    for images_u8, labels_N in images.subset.stream(torch.arange(len(images.subset)).split(batch)):
        correct += int((logits(images.preprocessing(images_u8)).argmax(1) == labels_N).sum())
    return correct


def train_the_papers_way(net: PruningNet, recipe: Recipe) -> Callable[[Tensor, Tensor, Tensor], float]:
    """A training step ``(images, labels, genome_G) -> loss`` as the original implementation of MetaPruning does it.

    The weights of all layers are generated at full width and cropped; autograd makes the gradient of every basis, as
    large as the basis, and `torch.optim.SGD` applies it. Eager, the layout of the images (the original: contiguous
    NCHW).
    """
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )

    def step(images_NCHW: Tensor, labels_N: Tensor, genome_G: Tensor) -> float:
        weights = [
            _full_size_then_cropped(
                net, index, genome_G, conv["out_channels"], 1 if conv["depthwise"] else conv["in_channels"]
            )
            for index, conv in enumerate(convolutions(net.space, genome_G))
        ]
        loss = F.cross_entropy(net.logits(images_NCHW, weights), labels_N, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _full_size_then_cropped(net: PruningNet, index: int, genome_G: Tensor, cout: int, cin: int) -> Tensor:
    """Weights ``[O, I, kh, kw]`` of one convolution: a strided view into those of the unpruned one."""
    layer = net.layer(index)
    code_H = net.codes(index, genome_G[None])[0]
    weight = F.linear(code_H, layer.basis.flatten(0, 2), layer.bias.flatten())
    kernel = net.space.convs[index].kernel
    return weight.view(*layer.bias.shape[:2], kernel, kernel)[:cout, :cin]


@torch.no_grad()
def folded_network(net: PruningNet, genome_G: Tensor, calibration_NCHW: Tensor) -> FoldedNet:
    """One candidate as a float32 network for inference: generated weights, calibrated and folded BatchNorm.

    Calibrated by the definition in `engine.population`: every convolution's mean and variance over all the images
    as one batch. Channels-last; to be run in `torch.inference_mode`.
    """
    network = FoldedNet(convolutions(net.space, genome_G), net.space.classes).to(net.classifier.weight.device)
    _crop_classifier(net, network)
    blocks = _blocks(network)
    for block, (weight,) in zip(blocks, net.generate(genome_G[None]), strict=True):
        block.conv.weight.copy_(weight)
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def calibrate(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)

    hooks = [block.norm.register_forward_pre_hook(calibrate) for block in blocks]
    network(calibration_NCHW.float().contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    for block in blocks:
        block.conv = fuse_conv_bn_eval(block.conv, block.norm)
        block.norm = nn.Identity()  # type: ignore[assignment]
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class FoldedNet(PrunedNet):
    """A `PrunedNet` for eager inference: activations in place, every tensor freed after its last use."""

    def __init__(self, convolutions: Sequence[dict[str, Any]], classes: int) -> None:
        super().__init__(convolutions, classes)
        last_read = {name: i for i, (_, *read) in enumerate(self.routes) for name in read if name}
        self.freed = [[name for name, last in last_read.items() if last == i] for i in range(len(self.routes))]
        for module in self.modules():
            if isinstance(module, nn.ReLU | nn.ReLU6):
                module.inplace = True

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        tensors = {"image": images_NCHW}
        for (name, source, shortcut), block, freed in zip(self.routes, _blocks(self), self.freed, strict=True):
            tensors[name] = block(tensors[source], None if shortcut is None else tensors[shortcut])
            for unused in freed:
                del tensors[unused]
        return self.classifier(tensors[name].mean(dim=(2, 3)))


@torch.inference_mode()
def logits_one_by_one(
    nets: Sequence[Callable[[Tensor], Tensor]], images_NCHW: Tensor, batch: int | None = None
) -> Tensor:
    """Logits ``[networks, N, classes]``: one network after another, ``batch`` images at a time, or all."""
    images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
    batches = images_NCHW.split(batch or len(images_NCHW))
    return torch.stack([torch.cat([net(images) for images in batches]) for net in nets])


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A channels-last copy of a network in another precision."""
    return copy.deepcopy(network).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(network: nn.Module, example_NCHW: Tensor, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], float]:
    """A network through `torch.compile`, for inputs of the shape of ``example_NCHW``; the seconds that took.

    Weights in ``dtype``, frozen. The callable takes channels-last images in ``dtype``. No cache of an earlier
    compilation is used, so the seconds are what a new structure costs. What was compiled before can no longer be
    called.

    Raises `RuntimeError` if oneDNN is to compute and no convolution was given to it: the baseline would be too slow.
    """
    _start_compiler()
    example_NCHW = example_NCHW.to(dtype=dtype, memory_format=torch.channels_last)
    torch._dynamo.reset()
    run = torch.compile(in_dtype(network, dtype).eval(), fullgraph=True, dynamic=False)

    # Freezing needs gradients off. Whatever would compile again later, without freezing, is an error instead.
    @torch.inference_mode()
    def logits(images_NCHW: Tensor) -> Tensor:
        return run(images_NCHW)

    torch._dynamo.utils.counters.clear()
    seconds = _seconds_to_compile(lambda: logits(example_NCHW))
    packed = torch._dynamo.utils.counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"]
    if example_NCHW.device.type == "cpu" and torch.backends.mkldnn.is_available() and not packed:
        raise RuntimeError("torch.compile packed no weights: freezing had no effect")
    return torch.compiler.set_stance("fail_on_recompile")(logits), seconds


@cache
@torch.inference_mode()
def _start_compiler() -> None:
    """Compile a trifle: the first compilation of a process loads the compiler and its C++ headers."""
    trifle = torch.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    _seconds_to_compile(lambda: trifle(torch.ones(1, 3, 8, 8)))


def _seconds_to_compile(first_call: Callable[[], Any]) -> float:
    # Imported here because it takes seconds, and a run of the tests imports this file too.
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    # Tracing reads the option before the `options` of a `torch.compile` call are in force, so it is set globally.
    with fresh_cache(), config.patch(INDUCTOR):
        began = perf_counter()
        first_call()
        return perf_counter() - began


def _blocks(network: PrunedNet) -> list[ConvBlock]:
    return [block for block in network.convs.values() if isinstance(block, ConvBlock)]


def _crop_classifier(net: PruningNet, network: PrunedNet) -> None:
    network.classifier.weight.copy_(net.classifier.weight[:, : network.classifier.in_features])
    network.classifier.bias.copy_(net.classifier.bias)
