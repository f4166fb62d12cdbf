"""What training a PruningNet takes, before anything is made: memory, traffic, and how often to bring all up to date."""

from __future__ import annotations

from math import prod

import torch

from engine.pruningnet import count_parameters
from engine.space import Gene, Space, Width
from engine.space.costs import cost_model
from engine.trie import output_images
from kernels import Recurrence

UPDATES = ("immediate", "delayed")
# The faster way on each kind of device.
DEFAULT_UPDATE = {"cpu": "delayed", "cuda": "immediate"}
FLOAT_BYTES = 4
# Tensors as large as a convolution's output, at the peak of a step: autograd keeps two or three, others come and go.
KEPT_PER_CONV = 3
# Tensors as large as the generated weights: packed, unpacked, and their gradient.
WEIGHT_COPIES = 3
# Of the time of training, what bringing all generators up to date may take.
RESTING = 1 / 16
# Operations of a step in the time in which a byte is read or written, about.
OPERATIONS_A_BYTE = 2.5


def steps_between_rests(update: str, space: Space, hidden: int | None, batch: int, resolution: int) -> int:
    """After how many steps all generators are brought up to date, and a run can be saved or stopped.

    With immediate updates after each; with delayed ones after so many that it takes a `RESTING` part of the time.
    """
    if update == "immediate":
        return 1
    # Weights and momentum are read and written.
    everything = 4 * FLOAT_BYTES * count_parameters(space, hidden)
    middle = cost_model(space, resolution).macs(space.uniform_choice(space.choices // 2))
    operations = 6 * int(middle) * batch
    kept = _mean_weights(space) / sum(conv.weights for conv in space.convs)
    a_step = everything * kept + operations / OPERATIONS_A_BYTE
    return min(max(1, round(everything / (RESTING * a_step))), Recurrence.LONGEST)


def parameter_bytes(
    space: Space, hidden: int | None, averaged: bool = False, basis_momentum: torch.dtype = torch.float32
) -> int:
    """Bytes of a PruningNet's weights, of their momentum and, if they are averaged, of their average.

    All momentum is counted as that of the bases, which are nearly all parameters.
    """
    return ((2 if averaged else 1) * FLOAT_BYTES + basis_momentum.itemsize) * count_parameters(space, hidden)


def step_bytes(space: Space, batch: int, resolution: int) -> int:
    """About how many bytes a training step holds besides: activations and generated weights of a middling structure.

    The largest structure takes about twice as much.
    """
    convolved, _ = output_images(space, (batch, resolution, resolution))
    outputs = sum(_mean_width(conv.cout) * prod(convolved[conv.name]) for conv in space.convs)
    return int(FLOAT_BYTES * (KEPT_PER_CONV * outputs + WEIGHT_COPIES * _mean_weights(space)))


def exchanged_bytes(space: Space, structures: int) -> int:
    """About how many bytes several ranks exchange in a step: gradients of the weights of middling structures."""
    classifier = (_mean_width(space.features) + 1) * space.classes
    return int(FLOAT_BYTES * structures * (_mean_weights(space) + classifier))


def _mean_weights(space: Space) -> float:
    """Generated weights of a middling structure."""
    return sum(
        _mean_width(conv.cout) * (1 if conv.depthwise else _mean_width(conv.cin)) * conv.kernel**2
        for conv in space.convs
    )


def _mean_width(width: Width) -> float:
    return sum(width.widths) / len(width.widths) if isinstance(width, Gene) else width
