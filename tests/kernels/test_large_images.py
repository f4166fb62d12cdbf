"""Images and results that do not fit the caches: cut into strips of rows, and written past them."""

import pytest
import torch
from convolutions import SEPARABLE, Case, Form, blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ragged import DTYPES, int32, random_activations
from test_fused_block import assert_block_is_exact
from torch import Tensor

import kernels
from kernels import BlockConv, backends
from kernels.layout import Image

OP = "fused_block"
few_examples = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# A stem of few channels, whose copy has a border; windows of a buffer whose rows are kept; a strided bottleneck.
FORMS: list[Form] = [
    [(False, 3, 2), (False, 1, 1), (True, 3, 1)],
    [(False, 7, 2)],
    [(False, 1, 1), (False, 3, 2), (False, 1, 1)],
    [(True, 3, 2), (False, 5, 1)],
    SEPARABLE[-1],
]


@pytest.mark.usefixtures("kernel")
@few_examples
@given(blocks(st.sampled_from(FORMS), maxima=[3, 70, 90, 40], image=(2, 131, 94)), st.sampled_from(DTYPES))
def test_a_block_of_large_images_equals_its_dense_convolutions(cases: list[Case], dtype: torch.dtype) -> None:
    assert_block_is_exact(cases, dtype, wide=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_larger_than_the_caches_have_the_bits_of_each_image_alone(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's convolutions make no such promise")
    torch.manual_seed(0)
    images, height, width = 13, 112, 112
    cin, hidden, cout = [9, 6], [20, 7], [100, 27]
    first = [torch.randn(o, i, 1, 1) for o, i in zip(hidden, cin, strict=True)]
    depthwise = [torch.randn(o, 1, 3, 3) for o in hidden]
    last = [torch.randn(o, i, 1, 1) for o, i in zip(cout, hidden, strict=True)]
    own = int32([0, 1])

    def conv(weights: list[Tensor], widths: list[int], cin: int, deep: bool = False) -> BlockConv:
        packed = kernels.pack_weights([w.to(dtype) for w in weights], cin, max(widths), deep)
        scale, shift = torch.ones(2, max(widths)), torch.zeros(2, max(widths))
        return BlockConv(packed, own, int32(widths), scale, shift, max(widths), deep, weights[0].shape[-1], 1, "relu6")

    convs = [conv(first, hidden, 9), conv(depthwise, hidden, 1, deep=True), conv(last, cout, 20)]

    def block(inputs: list[Tensor], shortcuts: list[Tensor], image: Image) -> list[Tensor]:
        y = kernels.fused_block(
            kernels.pack_activations(inputs, 9), int32(cin), own, convs, image=image, max_channels=9,
            shortcut=kernels.pack_activations(shortcuts, 100), shortcut_source_S=own,
        )  # fmt: skip
        return kernels.unpack_activations(y, cout, image)

    inputs, shortcuts = (random_activations(c, (images, height, width), dtype) for c in (cin, cout))
    together = block(inputs, shortcuts, (images, height, width))
    assert sum(y.shape[1] for y in together) * images * height * width * dtype.itemsize > 32 << 20
    for n in range(images):
        alone = block([x[n : n + 1] for x in inputs], [x[n : n + 1] for x in shortcuts], (1, height, width))
        for s in range(2):
            assert torch.equal(together[s][n], alone[s][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "as it is"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "depthwise"), [(1, 1, False), (3, 1, False), (3, 1, True), (3, 2, True)]
)
# Of small images a thread takes several at once; seven rows of these are an odd number of strips.
@pytest.mark.parametrize(("images", "size", "cin"), [(4, 112, [9, 100]), (53, 7, [850, 880])], ids=["large", "small"])
def test_gradients_larger_than_the_caches_have_the_bits_of_each_image_alone(
    kernel: str,
    dtype: torch.dtype,
    normalised: bool,
    kernel_size: int,
    stride: int,
    depthwise: bool,
    images: int,
    size: int,
    cin: list[int],
) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's convolutions make no such promise")
    torch.manual_seed(0)
    own, width = int32([0, 1]), max(cin)
    cout, out_size = cin if depthwise else [12, 5], -(-size // stride)
    shapes = [(o, 1 if depthwise else i, kernel_size, kernel_size) for i, o in zip(cin, cout, strict=True)]
    weights = kernels.pack_weights([torch.randn(s).to(dtype) for s in shapes], width, max(cout), depthwise)
    prologue = (torch.rand(2, width) + 0.5, torch.randn(2, width), "relu6") if normalised else (None, None, "none")
    grad_sums = torch.randn(2, 2, max(cout), dtype=torch.float64) / 64
    x, y, grad_y = (
        random_activations(channels, (images, side, side), dtype)
        for channels, side in ((cin, size), (cout, out_size), (cout, out_size))
    )

    def gradient(n: slice) -> list[Tensor]:
        """That of these images of both subnetworks."""
        inputs, outputs, grads = ([of_one[n] for of_one in dense] for dense in (x, y, grad_y))
        packed = [kernels.pack_activations(grads, max(cout)), grad_sums, kernels.pack_activations(outputs, max(cout))]
        packed += [kernels.pack_activations(inputs, width), weights]
        widths, most = ([int32(cout)], [width]) if depthwise else ([int32(cin), int32(cout)], [width, max(cout)])
        image = (len(inputs[0]), size, size)
        name = "ragged_depthwise_backward" if depthwise else "ragged_conv_backward"
        arguments = [*packed, *widths, own, own, list(image), kernel_size, stride, *most, *prologue, True]
        found = backends.implementation(name, inputs[0])(*arguments)
        return kernels.unpack_activations(found[0], cin, image)

    together = gradient(slice(None))
    assert sum(d.shape[1] for d in together) * images * size * size * dtype.itemsize > 8 << 20
    for n in range(images):
        for whole, alone in zip(together, gradient(slice(n, n + 1)), strict=True):
            assert torch.equal(whole[n], alone[0])
