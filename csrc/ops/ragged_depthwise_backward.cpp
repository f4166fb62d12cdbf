// Registers ragged_depthwise_backward on the CPU. Schema and fake kernel are declared in kernels/ops.py.

#include "ragged_depthwise_backward.h"

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "buffers.h"
#include "items.h"
#include "readers.h"

namespace metaprune {
namespace {

using Numbers = std::vector<double>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The gradient of the weights, packed like them: the sums of the items of all subnetworks, in their order.
template <typename T>
Tensor weight_gradient(const RaggedDepthwiseBackward<T>& args, const Tensor& weight) {
    const Tensor grad =
        torch::stable::new_empty(weight, {weight.size(0), args.weight_slot}, ScalarType::Float);
    const std::int64_t taps = args.kernel * args.kernel, padded = args.padded();
    Numbers totals(static_cast<std::size_t>(weight.size(0) * args.weight_slot));
    const double* sums = args.weight_sums;
    for (std::int64_t s = 0; s < args.S; ++s) {
        double* slot = totals.data() + args.weight_source[s] * args.weight_slot;
        const std::int64_t stride = round_up(args.channels[s], 8);
        for (std::int64_t i = 0; i < args.groups() * taps; ++i, sums += padded) {
            for (std::int64_t c = 0; c < args.channels[s]; ++c) slot[i % taps * stride + c] += sums[c];
        }
    }
    auto* to = mutable_data<float>(grad);
    for (const double total : totals) *to++ = static_cast<float>(total);
    return in_dtype(grad, weight.scalar_type());
}

// The gradient of shift (part 0) or scale (part 1) of the input, [slots, max_channels].
template <typename T>
Tensor input_gradient(const RaggedDepthwiseBackward<T>& args, const Readers& readers, std::int64_t part,
                      const Tensor& like) {
    const Tensor grad = torch::stable::new_zeros(like, {args.slots, args.max_channels}, ScalarType::Float);
    auto* to = mutable_data<float>(grad);
    for (std::int64_t l = 0; l < args.slots; ++l) {
        if (readers.count(l) == 0) continue;
        for (std::int64_t c = 0; c < args.channels[readers.readers[readers.first[l]]]; ++c) {
            double total = 0;
            for (std::int64_t g = 0; g < args.groups(); ++g) {
                total += args.input_sums[((l * args.groups() + g) * 2 + part) * args.padded() + c];
            }
            to[l * args.max_channels + c] = static_cast<float>(total);
        }
    }
    return in_dtype(grad, like.scalar_type());
}

Gradients ragged_depthwise_backward_cpu(
    const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sums, const Tensor& y,
    const Tensor& x, const Tensor& weight, const Tensor& channels, const Tensor& source,
    const Tensor& weight_source, const std::vector<std::int64_t>& image, std::int64_t kernel,
    std::int64_t stride, std::int64_t max_channels, const std::optional<Tensor>& input_scale,
    const std::optional<Tensor>& input_shift, const std::string& input_activation, bool needs_x) {
    return with_storage_type("ragged_depthwise_backward", x, [&](auto storage) -> Gradients {
        using T = decltype(storage);
        const ScalarType dtype = x.scalar_type();
        RaggedDepthwiseBackward<T> args{};
        args.S = expect_count("channels", channels);
        const std::int64_t slot = expect_slot(image, max_channels);
        args.slots = expect_buffer("x", x, dtype, slot);
        args.N = image[0];
        args.H = image[1];
        args.W = image[2];
        expect_window(kernel, stride);
        args.kernel = kernel;
        args.stride = stride;
        args.max_channels = max_channels;
        args.x = data<T>(x);
        const std::int32_t* sources = expect_slots("source", source, args.S, args.slots);
        args.channels = expect_widths("channels", channels, args.S, max_channels);
        const Readers readers = readers_of(sources, args.S, args.slots, "channels", args.channels);
        args.first_reader = readers.first.data();
        args.readers = readers.readers.data();
        args.weight_slot = kernel * kernel * round_up(max_channels, 8);
        const std::int64_t weights = expect_buffer("weight", weight, dtype, args.weight_slot);
        args.weight_source = expect_slots("weight_source", weight_source, args.S, weights);
        static_cast<void>(readers_of(args.weight_source, args.S, weights, "channels", args.channels));
        args.weight = data<T>(weight);
        const std::int64_t y_slot = expect_slot({args.N, args.out(args.H), args.out(args.W)}, max_channels);
        if (grad) {
            expect("grad", *grad, dtype, {args.S, y_slot});
            args.grad = data<T>(*grad);
        }
        if (grad_sums) {
            expect("y", y, dtype, {args.S, y_slot});
            args.y = data<T>(y);
            expect("grad_sums", *grad_sums, ScalarType::Double, {args.S, 2, max_channels});
            args.grad_sums = data<double>(*grad_sums);
        }
        STD_TORCH_CHECK(input_scale.has_value() == input_shift.has_value(),
                        "input_scale and input_shift must be given together or not at all");
        Tensor scales, shifts;
        Numbers input_sums;
        args.input_clamp = expect_activation(input_activation);
        if (input_scale) {
            scales = expect_floats("input_scale", *input_scale, dtype, {args.slots, max_channels});
            shifts = expect_floats("input_shift", *input_shift, dtype, {args.slots, max_channels});
            args.input_scale = data<float>(scales);
            args.input_shift = data<float>(shifts);
        }
        const bool needs_prologue = needs_x && input_scale;
        if (needs_prologue) {
            input_sums.resize(args.slots * args.groups() * 2 * args.padded());
            args.input_sums = input_sums.data();
        }
        Numbers weight_sums(args.S * args.groups() * kernel * kernel * args.padded());
        args.weight_sums = weight_sums.data();
        const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
        const Tensor grad_x = needs_x ? new_buffer(x, {args.slots, slot}) : nothing();
        if (needs_x) {
            args.grad_x = mutable_data<T>(grad_x);
            args.streams = past_caches(elements_read(readers, args.channels, args.N * args.H * args.W) *
                                       static_cast<std::int64_t>(sizeof(T)));
            clear_unread(args.grad_x, slot, readers);
        }
        const Isa isa = chosen_isa();
        for_each_item(args.slots * args.groups(), [&](std::int64_t begin, std::int64_t end) {
            ragged_depthwise_backward(isa, args, begin, end);
        });
        const Tensor grad_weight = weight_gradient(args, weight);
        if (!needs_prologue) return {grad_x, grad_weight, nothing(), nothing()};
        return {grad_x, grad_weight, input_gradient(args, readers, 1, *input_scale),
                input_gradient(args, readers, 0, *input_shift)};
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_depthwise_backward", TORCH_BOX(&metaprune::ragged_depthwise_backward_cpu));
}
