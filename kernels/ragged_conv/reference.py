"""`ragged_conv` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels, O channels out.
"""

from torch import Tensor

from kernels.dense import (
    convolve,
    dense_inputs,
    dense_shortcuts,
    dense_weights,
    rows,
    stack_sums,
    vector_jacobian_products,
    widths_on_host,
)
from kernels.layout import Image, gather_activations, output_image


def ragged_conv_reference(
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """y[s] = act(conv2d(input[source[s]], weight[weight_source[s]]) · scale[s] + shift[s] + shortcut).

    With shortcut[shortcut_source[s]] and input[l] = act_in(x[l] · input_scale[l] + input_shift[l]). Shapes and
    errors: `kernels.ragged_conv`.
    """
    cins, couts = widths_on_host("cin", cin, max_cin), widths_on_host("cout", cout, max_cout)
    out_image = output_image(image, kernel, stride)
    sums: list[Tensor] | None = [] if statistics else None
    outputs = convolve(
        dense_inputs(x, cins, source, image, input_scale, input_shift, input_activation),
        dense_weights(weight, cins, couts, weight_source, kernel),
        stride,
        rows(scale, len(couts)),
        rows(shift, len(couts)),
        dense_shortcuts(shortcut, shortcut_source, couts, out_image),
        activation,
        sums,
    )
    y = gather_activations(outputs, len(couts), out_image, max_cout, x)
    return y, stack_sums(sums, max_cout, x)


def ragged_conv_backward_reference(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, input_scale and input_shift of a bare `ragged_conv` with the output `y`.

    Those of y `[S, slot]` and of the sums float64 `[S, 2, max_cout]` are given; None stands for zero. Each has
    the shape and dtype of what it is the gradient of, zero where that is not read; what is absent, and without
    `needs_x` all but that of weight, is empty. This definition runs the convolution again, under autograd, and
    leaves `y` alone; a kernel may take it instead.
    """
    widths = (cin, cout, source, weight_source, image, kernel, stride, max_cin, max_cout)
    epilogue = (None, None, "none", None, None)
    statistics = grad_sums is not None

    def forward(
        leaf: Tensor | None, weights: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = (x, input_scale, input_shift) if leaf is None else (leaf, scale, shift)
        return ragged_conv_reference(given[0], weights, *widths, *epilogue, *given[1:], input_activation, statistics)

    inputs = (x, weight, input_scale, input_shift) if needs_x else (None, weight, None, None)
    d_x, d_weight, d_scale, d_shift = vector_jacobian_products(forward, inputs, (grad_y, grad_sums))
    return d_x, d_weight, d_scale, d_shift
