"""The hypernetwork: one small weight generator per convolution.

For a convolution with context ratios ``r`` and hidden size ``h``: ``w = relu(fc1(r)) · basisᵀ + bias`` at full width,
cropped to the first ``cout × cin`` channels (MetaPruning, section 3.1). BatchNorm has no learned parameters, because
its statistics belong to one structure; the classifier is an ordinary linear layer, cropped on its input.

With hidden size 0 (`SHARED`) nothing is generated: codes and basis are empty, and ``bias`` is a weight that all
structures share, the ablation of the paper.

Shape suffixes: S subnetworks, G genes, N images, O out channels, I in channels, K kernel taps, H hidden size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.space import IMAGE, Conv, Space, max_width
from kernels import generate_weights, unpack_weights

NORM_EPSILON = 1e-5
# The hidden size of weights that are not generated.
SHARED = 0


class WeightGenerator(nn.Module):
    """Generates the weights of one convolution, for many subnetworks at once."""

    def __init__(self, conv: Conv, hidden: int, device: torch.device | str) -> None:
        super().__init__()
        self.depthwise = conv.depthwise
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.fc1 = nn.Linear(len(conv.context), hidden, device=device)
        shape = (max_width(conv.cout), conv.fan_in, conv.kernel**2)
        self.basis = nn.Parameter(torch.empty(*shape, hidden, device=device))
        self.bias = nn.Parameter(torch.empty(shape, device=device))

    def codes(self, ratios_SC: Tensor) -> Tensor:
        """Codes ``[S, H]`` of the context ratios ``[S, contexts]``."""
        return _codes(ratios_SC.T[:, :, None], self.fc1.weight, self.fc1.bias)

    def forward(self, codes_SH: Tensor, cin_S: Tensor, cout_S: Tensor) -> Tensor:
        """Packed weights of S subnetworks (`kernels.generate_weights`)."""
        return generate_weights(
            self.basis, self.bias, codes_SH.to(self.basis.dtype), cin_S, cout_S, depthwise=self.depthwise
        )


class PruningNet(nn.Module):
    """Weight generators for every convolution of a space, and its classifier.

    ``hidden`` overrides the hidden size of every generator; the paper's sizes are the space's own. Parameters are
    drawn as `torch.nn.Linear` draws them, those of `SHARED` weights as `torch.nn.Conv2d` does, from ``generator``;
    without one they are left for a checkpoint to fill.
    """

    def __init__(
        self,
        space: Space,
        hidden: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.space = space
        self.generators = nn.ModuleList(WeightGenerator(c, hidden_size(c, hidden), device) for c in space.convs)
        self.classifier = nn.Linear(max_width(space.features), space.classes, device=device)
        ratios_GC = torch.tensor([gene.ratios for gene in space.genes], device=device)
        self.register_buffer("ratios_GC", ratios_GC, persistent=False)
        # Of the convolutions with as many contexts, in order: the gene of each context of each number of their codes.
        for contexts in self._contexts():
            genes = [
                [space.gene_index[gene] for gene in space.convs[layer].context]
                for layer in self._layers(contexts)
                for _ in range(self.layer(layer).fc1.out_features)
            ]
            genes_HC = torch.tensor(genes, dtype=torch.long, device=device).view(len(genes), contexts)
            self.register_buffer(f"genes_of_{contexts}", genes_HC.T.contiguous(), persistent=False)
        if generator is not None:
            self._reset(generator)

    @torch.no_grad()
    def _reset(self, generator: torch.Generator) -> None:
        for layer in map(self.layer, range(len(self.generators))):
            _draw(layer.fc1, layer.fc1.in_features, generator)
            _draw(layer, layer.basis.shape[-1] or layer.bias[0].numel(), generator)
        _draw(self.classifier, self.classifier.in_features, generator)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of the bases: that of generated weights, and of activations when candidates are scored."""
        return self.layer(0).basis.dtype

    def to_precision(self, dtype: torch.dtype) -> PruningNet:
        """Round the bases to ``dtype`` in place; codes and the classifier keep theirs."""
        for layer in map(self.layer, range(len(self.generators))):
            layer.basis.data, layer.bias.data = layer.basis.data.to(dtype), layer.bias.data.to(dtype)
        return self

    def layer(self, index: int) -> WeightGenerator:
        """The generator of one convolution."""
        generator = self.generators[index]
        assert isinstance(generator, WeightGenerator)
        return generator

    def codes(self, layer: int, genome_SG: Tensor) -> Tensor:
        """Codes ``[S, H]`` of one convolution for valid genomes ``[S, G]``."""
        # Rows one by one: a list of their numbers would have to be copied to a GPU, which that would wait for.
        ratios_GS = self._ratios(genome_SG)
        rows = [ratios_GS[self.space.gene_index[gene]] for gene in self.space.convs[layer].context]
        return self.layer(layer).codes(torch.stack(rows, dim=1))

    def _ratios(self, genome_SG: Tensor) -> Tensor:
        """The ratios ``[G, S]`` of genomes on the device of the network."""
        ratios_GC: Tensor = self.ratios_GC  # type: ignore[assignment]
        return ratios_GC.gather(1, genome_SG.T)

    def all_codes(self, genome_SG: Tensor) -> list[Tensor]:
        """Codes ``[S, H]`` of every convolution: those with as many contexts are found together."""
        ratios_GS = self._ratios(genome_SG)
        codes: dict[int, Tensor] = {}
        for contexts in self._contexts():
            layers = self._layers(contexts)
            linear = [self.layer(layer).fc1 for layer in layers]
            ratios_CSH = ratios_GS[self.get_buffer(f"genes_of_{contexts}")].mT
            code_SH = _codes(ratios_CSH, torch.cat([x.weight for x in linear]), torch.cat([x.bias for x in linear]))
            parts = code_SH.split([x.out_features for x in linear], dim=1)
            codes.update((layer, part.contiguous()) for layer, part in zip(layers, parts, strict=True))
        return [codes[layer] for layer in range(len(self.generators))]

    def _contexts(self) -> list[int]:
        """How many contexts convolutions have."""
        return sorted({len(conv.context) for conv in self.space.convs})

    def _layers(self, contexts: int) -> list[int]:
        return [layer for layer, conv in enumerate(self.space.convs) if len(conv.context) == contexts]

    def widths(self, genome_SG: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Input and output channels `[S]`, int32, of every convolution."""
        gene_widths_SG = self.space.gene_widths(genome_SG).int()
        width_of = self.space.width_of
        return [(width_of(c.cin, gene_widths_SG), width_of(c.cout, gene_widths_SG)) for c in self.space.convs]

    def generate(self, genome_SG: Tensor) -> list[list[Tensor]]:
        """Dense weights ``[O, I, kh, kw]`` of every convolution (outer list) of S subnetworks (inner list)."""
        widths = self.widths(genome_SG)
        return self.unpack(self.generate_packed(self.all_codes(genome_SG), widths), widths)

    def generate_packed(self, codes: Sequence[Tensor], widths: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Packed weights ``[S, slot]`` of every convolution, from `all_codes` and `widths`."""
        given = enumerate(zip(codes, widths, strict=True))
        return [self.layer(layer)(code_SH, *width) for layer, (code_SH, width) in given]

    def unpack(self, packed: Sequence[Tensor], widths: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
        """What `generate` returns of what `generate_packed` does, as differentiable views."""
        return [
            unpack_weights(weight, cin_S, cout_S, kernel=conv.kernel, depthwise=conv.depthwise)
            for conv, weight, (cin_S, cout_S) in zip(self.space.convs, packed, widths, strict=True)
        ]

    def forward(self, images_NCHW: Tensor, genome_SG: Tensor) -> Tensor:
        """Training logits ``[N, classes]`` of S subnetworks, among whom the images are split in order."""
        weights, parts = self.generate(genome_SG), images_NCHW.tensor_split(len(genome_SG))
        return torch.cat([self.logits(part, [w[s] for w in weights]) for s, part in enumerate(parts)])

    def logits(self, images_NCHW: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Training logits ``[N, classes]`` of one subnetwork: dense weights, one tensor a convolution."""
        features = self.features(images_NCHW, weights)
        return F.linear(features, self.classifier.weight[:, : features.shape[1]], self.classifier.bias)

    def features(self, images_NCHW: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What the classifier reads ``[N, C]``: the last convolution's output, averaged over the image.

        Every convolution is normalised by the statistics of these images (training-mode BatchNorm without
        parameters). This is the definition of the forward pass of training, in plain PyTorch.
        """
        tensors = {IMAGE: images_NCHW}
        for conv, weight in zip(self.space.convs, weights, strict=True):
            x = tensors[conv.source]
            groups = len(weight) if conv.depthwise else 1
            x = F.conv2d(x, weight, stride=conv.stride, padding=conv.kernel // 2, groups=groups)
            x = F.batch_norm(x, None, None, training=True, eps=NORM_EPSILON)
            if conv.shortcut is not None:
                x = x + tensors[conv.shortcut]
            x = activate(x, conv.activation)
            if conv.max_pool:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
            tensors[conv.name] = x
        return tensors[self.space.convs[-1].name].mean(dim=(2, 3))


def _draw(module: nn.Module, fan_in: int, generator: torch.Generator) -> None:
    """Uniform in ±1/√fan_in, from a CPU generator, so that every device starts from the same weights."""
    bound = 1 / math.sqrt(fan_in)
    for parameter in module.parameters(recurse=False):
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def _codes(ratios_CS1: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    """Codes ``[S, H]``, relu(weight · ratios + bias), of context ratios ``[C, S, 1]``, or ``[C, S, H]``.

    Written out as elementwise operations: a matrix product rounds differently for different S, and a
    subnetwork's weights may not depend on how many others are generated with it.
    """
    code_SH = bias_H.expand(ratios_CS1.shape[1], -1)
    for ratio_S1, weight_H in zip(ratios_CS1, weight_HC.T, strict=True):
        code_SH = code_SH + ratio_S1 * weight_H
    return F.relu(code_SH)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by name."""
    match activation:
        case "relu":
            return F.relu(x)
        case "relu6":
            return F.relu6(x)
        case _:
            return x


def hidden_size(conv: Conv, hidden: int | None) -> int:
    """The hidden size of a convolution's generator: ``hidden``, or its own."""
    return conv.hidden if hidden is None else hidden


def count_parameters(space: Space, hidden: int | None = None) -> int:
    """Parameters of a space's PruningNet, without building it."""
    weights = 0
    for conv in space.convs:
        size = hidden_size(conv, hidden)
        weights += (len(conv.context) + 1) * size + conv.weights * (size + 1)
    return weights + (max_width(space.features) + 1) * space.classes
