// Registers scale_and_shift on the CPU. Schema, fake kernel and gradient are declared in kernels/ops.py.
//
// There is one call for every convolution and little to do in it, so it has no kernel per instruction set.
// Numbers are rounded as those of the reference are.

#include <cmath>
#include <cstdint>
#include <tuple>

#include "arguments.h"

namespace metaprune {
namespace {

// Sums of channels and of their squares, [S, 2, C].
struct Sums {
    std::int64_t S, C, count;
    double epsilon;
    const double* values;

    Sums(const Tensor& sums, std::int64_t count, double epsilon) : count(count), epsilon(epsilon) {
        STD_TORCH_CHECK(sums.dim() == 3 && count >= 1, "sums must be [S, 2, C], their count at least 1");
        S = sums.size(0);
        C = sums.size(2);
        expect("sums", sums, ScalarType::Double, {S, 2, C});
        values = data<double>(sums);
    }

    double mean(std::int64_t s, std::int64_t c) const {
        return values[2 * s * C + c] / static_cast<double>(count);
    }
    double scale(std::int64_t s, std::int64_t c) const {
        const double m = mean(s, c), square = values[(2 * s + 1) * C + c] / static_cast<double>(count);
        const double variance = square - m * m;
        // What is no number stays none.
        return 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + epsilon);
    }
};

std::tuple<Tensor, Tensor> scale_and_shift_cpu(const Tensor& sums, std::int64_t count, double epsilon) {
    const Sums from(sums, count, epsilon);
    const Tensor scale = torch::stable::new_empty(sums, {from.S, from.C}, ScalarType::Float);
    const Tensor shift = torch::stable::new_empty(sums, {from.S, from.C}, ScalarType::Float);
    auto *to_scale = mutable_data<float>(scale), *to_shift = mutable_data<float>(shift);
    for (std::int64_t s = 0; s < from.S; ++s) {
        for (std::int64_t c = 0; c < from.C; ++c) {
            const double number = from.scale(s, c);
            *to_scale++ = static_cast<float>(number);
            *to_shift++ = static_cast<float>(-(from.mean(s, c) * number));
        }
    }
    return {scale, shift};
}

Tensor scale_and_shift_backward_cpu(const Tensor& grad_scale, const Tensor& grad_shift, const Tensor& sums,
                                    std::int64_t count, double epsilon) {
    const Sums from(sums, count, epsilon);
    expect("grad_scale", grad_scale, ScalarType::Float, {from.S, from.C});
    expect("grad_shift", grad_shift, ScalarType::Float, {from.S, from.C});
    const auto *d_scales = data<float>(grad_scale), *d_shifts = data<float>(grad_shift);
    const Tensor grad = torch::stable::new_empty(sums, {from.S, 2, from.C});
    auto* to = mutable_data<double>(grad);
    const auto pixels = static_cast<double>(count);
    for (std::int64_t s = 0; s < from.S; ++s, to += 2 * from.C) {
        for (std::int64_t c = 0; c < from.C; ++c) {
            const double mean = from.mean(s, c), scale = from.scale(s, c);
            const double d_scale = *d_scales++, d_shift = *d_shifts++;
            const double d_square = (d_scale - mean * d_shift) * (scale * scale * scale) * -0.5;
            to[c] = (-scale * d_shift - 2.0 * mean * d_square) / pixels;
            to[from.C + c] = d_square / pixels;
        }
    }
    return grad;
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("scale_and_shift", TORCH_BOX(&metaprune::scale_and_shift_cpu));
    m.impl("scale_and_shift_backward", TORCH_BOX(&metaprune::scale_and_shift_backward_cpu));
}
