// Registers ragged_depthwise on a GPU. Schema, fake kernel and gradient are declared in kernels/ops.py.

#include "cuda/ragged_depthwise.h"

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gpu.h"

namespace metaprune::cuda {
namespace {

std::tuple<Tensor, Tensor> ragged_depthwise_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& channels, const Tensor& source,
    const Tensor& weight_source, const std::vector<std::int64_t>& image, std::int64_t kernel,
    std::int64_t stride, std::int64_t max_channels, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation,
    const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_shift,
    const std::string& input_activation, bool statistics) {
    return with_gpu_storage_type("ragged_depthwise", x, [&](auto storage) {
        using T = decltype(storage);
        const Beside beside(x);
        const std::int64_t x_slot = expect_slot(image, max_channels);
        expect_window(kernel, stride);
        STD_TORCH_CHECK(input_scale.has_value() == input_shift.has_value(),
                        "input_scale and input_shift must be given together or not at all");
        STD_TORCH_CHECK(input_scale.has_value() || input_activation == "none",
                        "an input_activation needs an input_scale");
        const auto out = [&](std::int64_t side) { return (side + kernel / 2 * 2 - kernel) / stride + 1; };
        const std::vector<std::int64_t> out_image = {image[0], out(image[1]), out(image[2])};

        RaggedDepthwise<T> args{};
        args.S = expect_gpu_count("channels", channels);
        args.N = static_cast<std::int32_t>(image[0]);
        args.H = static_cast<std::int32_t>(image[1]);
        args.W = static_cast<std::int32_t>(image[2]);
        args.out_H = static_cast<std::int32_t>(out_image[1]);
        args.out_W = static_cast<std::int32_t>(out_image[2]);
        args.kernel = static_cast<std::int32_t>(kernel);
        args.stride = static_cast<std::int32_t>(stride);
        args.max_channels = expect_32_bits("max_channels", max_channels);
        expect_32_bits("the number of pixels",
                       expect_slot({image[0], image[1] + kernel, image[2] + kernel}, 1) / 8);
        args.x_slot = x_slot;
        args.weight_slot = kernel * kernel * round_up(max_channels, 8);
        args.y_slot = expect_slot(out_image, max_channels);
        args.x = beside.buffer<T>("x", x, x_slot);
        args.weight = beside.buffer<T>("weight", weight, args.weight_slot);
        args.channels = beside.integers("channels", channels, args.S);
        args.source = beside.integers("source", source, args.S);
        args.weight_source = beside.integers("weight_source", weight_source, args.S);
        const auto scales = beside.floats("scale", scale, {args.S, max_channels});
        const auto shifts = beside.floats("shift", shift, {args.S, max_channels});
        const auto input_scales = beside.floats("input_scale", input_scale, {x.size(0), max_channels});
        const auto input_shifts = beside.floats("input_shift", input_shift, {x.size(0), max_channels});
        args.scale = data_or_null(scales);
        args.shift = data_or_null(shifts);
        args.clamp = expect_activation(activation);
        args.input_scale = data_or_null(input_scales);
        args.input_shift = data_or_null(input_shifts);
        args.input_clamp = expect_activation(input_activation);

        const Queue queue(x);
        const Tensor y = torch::stable::new_empty(x, {args.S, args.y_slot});
        const std::int64_t rows = statistics ? args.S : 0;
        args.y = mutable_data<T>(y);
        args.tiles = depthwise_tiles(args);
        const Tensor partials =
            torch::stable::new_empty(x, {rows, args.tiles, 2, max_channels}, ScalarType::Float);
        const Tensor sums = statistics
                                ? torch::stable::new_empty(x, {rows, 2, max_channels}, ScalarType::Double)
                                : torch::stable::new_empty(x, {0}, ScalarType::Double);
        if (statistics) {
            args.partials = mutable_data<float>(partials);
            args.sums = mutable_data<double>(sums);
        }
        expect_launched("ragged_depthwise", ragged_depthwise(args, queue.stream()));
        return std::tuple(y, sums);
    });
}

}  // namespace
}  // namespace metaprune::cuda

STABLE_TORCH_LIBRARY_IMPL(metaprune_cuda, METAPRUNE_GPU, m) {
    m.impl("ragged_depthwise", TORCH_BOX(&metaprune::cuda::ragged_depthwise_cuda));
}
