"""Random convolutions of a ragged batch, dense or depthwise: as the op takes them, and as PyTorch does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from ragged import (
    ACTIVATIONS,
    activate,
    images,
    int32,
    kernel_sizes,
    limits,
    poisoned_activations,
    poisoned_channels,
    poisoned_weights,
    random_activations,
    widths,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels.layout import Image, output_image


@dataclass(frozen=True)
class Case:
    """One call of `ragged_conv` or `ragged_depthwise`.

    `inputs` are dense, one per slot of x; `weights` one per slot of the weights; `shortcuts` one per subnetwork.
    Scales and shifts are NaN beyond the channels they belong to.
    """

    depthwise: bool
    inputs: list[Tensor]
    weights: list[Tensor]
    source: list[int]
    weight_source: list[int]
    image: Image
    stride: int
    max_cin: int
    max_cout: int
    scale: Tensor | None
    shift: Tensor | None
    activation: str
    shortcuts: list[Tensor] | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    input_activation: str

    @property
    def kernel(self) -> int:
        return self.weights[0].shape[-1]

    @property
    def out_image(self) -> tuple[int, int, int]:
        return output_image(self.image, self.kernel, self.stride)

    @property
    def cout(self) -> list[int]:
        return [len(self.weights[w]) for w in self.weight_source]

    @property
    def cin(self) -> list[int]:
        return [self.inputs[slot].shape[1] for slot in self.source]

    def cast(self, dtype: torch.dtype, per_channel: torch.dtype | None = None) -> "Case":
        """The same in another precision; scales and shifts in `per_channel` if that is given."""

        def numbers(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(per_channel or dtype)

        return replace(
            self,
            inputs=[t.to(dtype) for t in self.inputs],
            weights=[t.to(dtype) for t in self.weights],
            shortcuts=None if self.shortcuts is None else [t.to(dtype) for t in self.shortcuts],
            scale=numbers(self.scale),
            shift=numbers(self.shift),
            input_scale=numbers(self.input_scale),
            input_shift=numbers(self.input_shift),
        )

    def bare(self) -> "Case":
        """Without anything after the convolution."""
        return replace(self, scale=None, shift=None, activation="none", shortcuts=None)

    def alone(self, s: int) -> "Case":
        """Subnetwork s without the others; the slots stay."""

        def row(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[s : s + 1].contiguous()

        return replace(
            self,
            source=[self.source[s]],
            weight_source=[self.weight_source[s]],
            scale=row(self.scale),
            shift=row(self.shift),
            shortcuts=None if self.shortcuts is None else [self.shortcuts[s]],
        )


@st.composite
def dense_weights(
    draw: st.DrawFn, cin: list[int], cout: list[int], kernel: int, depthwise: bool
) -> tuple[list[Tensor], list[int]]:
    """Weights in slots, in any order, and the slot of each subnetwork: those of the same widths may share one.

    What they sum up to is of order one.
    """
    shapes: list[tuple[int, int]] = []
    places = []
    for shape in zip(cout, [1] * len(cin) if depthwise else cin, strict=True):
        if shape not in shapes or draw(st.booleans()):
            shapes.append(shape)
            places.append(len(shapes) - 1)
        else:
            places.append(shapes.index(shape))
    order = draw(st.permutations(range(len(shapes))))
    weights = [torch.randn(*shapes[w], kernel, kernel) / (shapes[w][1] * kernel**2) ** 0.5 for w in order]
    return weights, [order.index(w) for w in places]


@st.composite
def convolutions(draw: st.DrawFn, depthwise: bool) -> Case:
    """A case in float32."""
    torch.manual_seed(draw(st.integers(0, 999)))
    count, slots = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    max_cin = draw(limits)
    max_cout = max_cin if depthwise else draw(limits)
    kernel, stride, image = draw(kernel_sizes), draw(st.integers(1, 3)), draw(images())
    channels = draw(widths(slots, max_cin))
    source = draw(st.lists(st.integers(0, slots - 1), min_size=count, max_size=count))
    cin = [channels[slot] for slot in source]
    cout = cin if depthwise else draw(widths(count, max_cout))
    weights, weight_source = draw(dense_weights(cin, cout, kernel, depthwise))
    with_prologue, with_shortcut = draw(st.booleans()), not depthwise and draw(st.booleans())
    shortcuts = random_activations(cout, output_image(image, kernel, stride), torch.float32)
    return Case(
        depthwise=depthwise,
        inputs=random_activations(channels, image, torch.float32),
        weights=weights,
        source=source,
        weight_source=weight_source,
        image=image,
        stride=stride,
        max_cin=max_cin,
        max_cout=max_cout,
        scale=poisoned_channels(cout, max_cout) if draw(st.booleans()) else None,
        shift=poisoned_channels(cout, max_cout) if draw(st.booleans()) else None,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        shortcuts=shortcuts if with_shortcut else None,
        input_scale=poisoned_channels(channels, max_cin) if with_prologue else None,
        input_shift=poisoned_channels(channels, max_cin) if with_prologue else None,
        input_activation=draw(st.sampled_from(ACTIVATIONS)) if with_prologue else "none",
    )


# Of each convolution of a block: whether it is depthwise, its kernel size and stride.
Form = list[tuple[bool, int, int]]
any_form = st.lists(st.tuples(st.booleans(), kernel_sizes, st.integers(1, 3)), min_size=1, max_size=3)
SEPARABLE: list[Form] = [
    [*before, (True, 3, stride), (False, 1, 1)] for before in ([], [(False, 1, 1)]) for stride in (1, 2)
]


@st.composite
def blocks(
    draw: st.DrawFn,
    forms: st.SearchStrategy[Form] = any_form,
    maxima: Sequence[int] | None = None,
    image: Image | None = None,
) -> list[Case]:
    """One to three convolutions in a chain, in float32; all but the first have no inputs yet.

    `maxima` are the most channels of x and of the output of every dense convolution.
    """
    torch.manual_seed(draw(st.integers(0, 999)))
    count, slots = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    most = iter(maxima) if maxima else iter(lambda: draw(limits), None)
    max_cin, image, form = next(most), image or draw(images()), draw(forms)
    channels = draw(widths(slots, max_cin))
    source = draw(st.lists(st.integers(0, slots - 1), min_size=count, max_size=count))
    inputs, cin = random_activations(channels, image, torch.float32), [channels[slot] for slot in source]
    cases: list[Case] = []
    for depthwise, kernel, stride in form:
        max_cout = max_cin if depthwise else next(most)
        cout = cin if depthwise else draw(widths(count, max_cout))
        weights, weight_source = draw(dense_weights(cin, cout, kernel, depthwise))
        case = Case(
            depthwise=depthwise,
            inputs=[] if cases else inputs,
            weights=weights,
            source=list(range(count)) if cases else source,
            weight_source=weight_source,
            image=image,
            stride=stride,
            max_cin=max_cin,
            max_cout=max_cout,
            scale=poisoned_channels(cout, max_cout),
            shift=poisoned_channels(cout, max_cout),
            activation=draw(st.sampled_from(ACTIVATIONS)),
            shortcuts=None,
            input_scale=None,
            input_shift=None,
            input_activation="none",
        )
        if len(cases) == len(form) - 1 and draw(st.booleans()):
            case = replace(case, shortcuts=random_activations(cout, case.out_image, torch.float32))
        cases.append(case)
        max_cin, cin, image = max_cout, cout, case.out_image
    return cases


def run(case: Case, statistics: bool = True) -> tuple[list[Tensor], Tensor]:
    """Dense outputs and sums of the op."""
    extra: dict[str, Any] = {
        "weight_source_S": int32(case.weight_source),
        "image": case.image,
        "kernel": case.kernel,
        "stride": case.stride,
        "activation": case.activation,
        "input_scale_LC": case.input_scale,
        "input_shift_LC": case.input_shift,
        "input_activation": case.input_activation,
        "statistics": statistics,
    }
    x = poisoned_activations(case.inputs, case.max_cin)
    weight = poisoned_weights(case.weights, case.max_cin, case.max_cout, case.depthwise)
    cin, cout, source = int32(case.cin), int32(case.cout), int32(case.source)
    if case.depthwise:
        extra |= {"max_channels": case.max_cin, "scale_SC": case.scale, "shift_SC": case.shift}
        y, sums = kernels.ragged_depthwise(x, weight, cout, source, **extra)
    else:
        extra |= {"max_cin": case.max_cin, "max_cout": case.max_cout, "scale_SO": case.scale, "shift_SO": case.shift}
        if case.shortcuts is not None:
            # In reverse order, so that a slot is not that of its subnetwork.
            extra["shortcut"] = poisoned_activations(case.shortcuts[::-1], case.max_cout)
            extra["shortcut_source_S"] = int32(list(range(len(cout)))[::-1])
        y, sums = kernels.ragged_conv(x, weight, cin, cout, source, **extra)
    return kernels.unpack_activations(y, cout, case.out_image), sums


def dense(case: Case, s: int) -> Tensor:
    """The output of subnetwork s by PyTorch, every step rounded to the precision of the case."""
    slot, weight = case.source[s], case.weights[case.weight_source[s]]
    x, out_channels = case.inputs[slot], len(weight)
    if case.input_scale is not None and case.input_shift is not None:
        scale_C, shift_C = (t[slot, : x.shape[1], None, None] for t in (case.input_scale, case.input_shift))
        x = activate(x * scale_C + shift_C, case.input_activation).to(x.dtype)
    groups = out_channels if case.depthwise else 1
    out = functional.conv2d(x, weight, stride=case.stride, padding=case.kernel // 2, groups=groups)
    if case.scale is not None:
        out = out * case.scale[s, :out_channels, None, None]
    if case.shift is not None:
        out = out + case.shift[s, :out_channels, None, None]
    if case.shortcuts is not None:
        out = out + case.shortcuts[s]
    return activate(out, case.activation).to(x.dtype)


def dense_sums(case: Case, s: int) -> Tensor:
    """The float64 sums `[2, max_cout]` of subnetwork s by PyTorch."""
    out = dense(case.bare().cast(torch.float64), s)
    sums = torch.zeros(2, case.max_cout, dtype=torch.float64)
    sums[:, : out.shape[1]] = torch.stack([out.sum((0, 2, 3)), out.square().sum((0, 2, 3))])
    return sums
