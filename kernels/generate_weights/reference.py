"""`generate_weights` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size of the weight generator.
"""

from math import isqrt

import torch
from torch import Tensor

from kernels.dense import compute_dtype, widths_on_host
from kernels.layout import read_weights, weight_slot, write_weights


def crops(cin: Tensor, cout: Tensor, basis: Tensor, depthwise: bool) -> list[tuple[int, int]]:
    """The S pairs (O_s, I_s) of kept channels, I_s = 1 if depthwise; `RuntimeError` if out of range."""
    cout_S = widths_on_host("cout", cout, basis.shape[0])
    cin_S = [1] * len(cout_S) if depthwise else widths_on_host("cin", cin, basis.shape[1])
    return list(zip(cout_S, cin_S, strict=True))


def generate_weights_reference(
    basis: Tensor, bias: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> Tensor:
    """w[s,o,i,k] = Σ_h basis[o,i,k,h] · codes[s,h] + bias[o,i,k] for o < cout[s], i < cin[s].

    Shapes and errors: `kernels.generate_weights`. Returns `[S, slot]` in the dtype of `basis`.
    """
    max_cout, max_cin, taps, hidden = basis.shape
    kernel, dtype = isqrt(taps), compute_dtype(basis.dtype)
    slot = weight_slot(max_cin, max_cout, kernel, basis.dtype, depthwise, basis.device)
    weight = basis.new_empty(codes.shape[0], slot)
    for s, (o, i) in enumerate(crops(cin, cout, basis, depthwise)):
        rows = basis[:o].to(dtype).view(o * max_cin * taps, hidden)
        dense = torch.mv(rows, codes[s].to(dtype)).view(o, max_cin, taps) + bias[:o]
        write_weights(weight[s], dense[:, :i].unflatten(2, (kernel, kernel)), depthwise)
    return weight


def generate_weights_backward_reference(
    grad: Tensor, basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `generate_weights`. With g[s,o,i,k] = grad inside the crop of s, else 0:

        d_basis[o,i,k,h] = Σ_s g[s,o,i,k] · codes[s,h]
        d_bias[o,i,k]    = Σ_s g[s,o,i,k]
        d_codes[s,h]     = Σ_{o,i,k} g[s,o,i,k] · basis[o,i,k,h]

    `grad` is `[S, slot]` like the result of `generate_weights`; its pad channels are not read. Returns
    tensors of the shapes and dtype of basis, bias and codes.
    """
    max_cout, max_cin, taps, hidden = basis.shape
    kernel, dtype = isqrt(taps), compute_dtype(basis.dtype)
    g_SOIK = basis.new_zeros(codes.shape[0], max_cout, max_cin, taps, dtype=dtype)
    d_codes = torch.empty_like(codes)
    for s, (o, i) in enumerate(crops(cin, cout, basis, depthwise)):
        g = g_SOIK[s, :o, :i].copy_(read_weights(grad[s], i, o, kernel, depthwise).flatten(2))
        d_codes[s] = torch.mv(basis[:o, :i].to(dtype).reshape(g.numel(), hidden).T, g.reshape(-1))
    d_basis = torch.mm(g_SOIK.view(len(codes), -1).T, codes.to(dtype)).view_as(basis)
    return d_basis.to(basis.dtype), g_SOIK.sum(0).to(basis.dtype), d_codes
