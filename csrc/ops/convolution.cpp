// Registers ragged_conv, ragged_depthwise and fused_block on the CPU: chains of one to three convolutions.

#include "convolution.h"

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "buffers.h"
#include "items.h"

namespace metaprune {
namespace {

using Image = std::vector<std::int64_t>;

// A chain whose pointers were checked, and what they need kept alive.
template <typename T>
struct Arguments {
    Chain<T> chain{};
    std::deque<Tensor> kept;
    ScalarType dtype;

    Arguments(const Tensor& x, const char* name, const Tensor& channels, const Tensor& source,
              const Image& image, std::int64_t max_channels)
        : dtype(x.scalar_type()) {
        const std::int64_t slots = expect_buffer("x", x, dtype, expect_slot(image, max_channels));
        chain.S = expect_count(name, channels);
        chain.N = image[0];
        chain.H = image[1];
        chain.W = image[2];
        chain.max_channels = max_channels;
        chain.x = data<T>(x);
        chain.source = expect_slots("source", source, chain.S, slots);
        chain.channels = expect_widths(name, channels, chain.S, max_channels);
        chain.input_clamp = expect_activation("none");
    }

    // [rows, columns] as float.
    const float* floats(const char* name, const std::optional<Tensor>& tensor, std::int64_t rows,
                        std::int64_t columns) {
        if (!tensor) return nullptr;
        kept.push_back(expect_floats(name, *tensor, dtype, {rows, columns}));
        return data<float>(kept.back());
    }

    void normalise(const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                   const std::string& activation, const Tensor& x) {
        STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                        "input_scale and input_shift must be given together or not at all");
        STD_TORCH_CHECK(scale.has_value() || activation == "none",
                        "an input_activation needs an input_scale");
        chain.input_scale = floats("input_scale", scale, x.size(0), chain.max_channels);
        chain.input_shift = floats("input_shift", shift, x.size(0), chain.max_channels);
        chain.input_clamp = expect_activation(activation);
    }

    void add(const Tensor& weight, const Tensor& weight_source, const char* name, const Tensor& channels,
             std::int64_t max_channels, bool depthwise, std::int64_t kernel, std::int64_t stride,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
             const std::string& activation) {
        const std::int64_t in =
            chain.stages == 0 ? chain.max_channels : chain.stage[chain.stages - 1].max_channels;
        const std::int32_t* in_channels =
            chain.stages == 0 ? chain.channels : chain.stage[chain.stages - 1].channels;
        expect_window(kernel, stride);
        STD_TORCH_CHECK(max_channels >= 1 && max_channels <= (1 << 24), "channels must be 1..", 1 << 24);
        Stage<T>& stage = chain.stage[chain.stages++];
        stage.depthwise = depthwise;
        stage.kernel = kernel;
        stage.stride = stride;
        stage.clamp = expect_activation(activation);
        stage.max_channels = max_channels;
        stage.channels = expect_widths(name, channels, chain.S, max_channels);
        const std::int64_t taps = kernel * kernel;
        stage.weight_slot = depthwise ? taps * round_up(max_channels, 8)
                                      : round_up(max_channels, kPanel) * taps * round_up(in, kPerWord<T>);
        const std::int64_t slots = expect_buffer("weight", weight, dtype, stage.weight_slot);
        stage.weight = data<T>(weight);
        stage.weight_source = expect_slots("weight_source", weight_source, chain.S, slots);
        stage.scale = floats("scale", scale, chain.S, max_channels);
        stage.shift = floats("shift", shift, chain.S, max_channels);
        for (std::int64_t s = 0; depthwise && s < chain.S; ++s) {
            STD_TORCH_CHECK(stage.channels[s] == in_channels[s],
                            "a depthwise convolution keeps its channels: [", s, "] has ", in_channels[s],
                            " in and ", stage.channels[s], " out");
        }
    }

    std::int64_t result_bytes(std::int64_t pixels) const {
        const std::int32_t* channels = chain.stage[chain.stages - 1].channels;
        std::int64_t width = 0;
        for (std::int64_t s = 0; s < chain.S; ++s) width += round_up(channels[s], 8);
        return chain.N * pixels * width * static_cast<std::int64_t>(sizeof(T));
    }

    std::tuple<Tensor, Tensor> run(const Tensor& x, const std::optional<Tensor>& shortcut,
                                   const std::optional<Tensor>& shortcut_source, bool statistics) {
        const std::int64_t width = chain.stage[chain.stages - 1].max_channels;
        const std::int64_t height = chain.size(chain.H, chain.stages),
                           across = chain.size(chain.W, chain.stages);
        STD_TORCH_CHECK(height >= 1 && across >= 1, "nothing is left of the image");
        const std::int64_t slot = chain.N * height * across * round_up(width, 8);
        STD_TORCH_CHECK(shortcut.has_value() == shortcut_source.has_value(),
                        "shortcut and shortcut_source must be given together or not at all");
        if (shortcut) {
            const std::int64_t slots = expect_buffer("shortcut", *shortcut, dtype, slot);
            chain.shortcut = data<T>(*shortcut);
            chain.shortcut_source = expect_slots("shortcut_source", *shortcut_source, chain.S, slots);
        }
        const Tensor y = new_buffer(x, {chain.S, slot});
        chain.y = mutable_data<T>(y);
        chain.streams = past_caches(result_bytes(height * across));
        chain.group = images_per_group(chain);
        const std::int64_t groups = chain.groups();
        Tensor partial;
        if (statistics) {
            partial = torch::stable::new_empty(x, {chain.S, groups, 2, width}, ScalarType::Double);
            chain.sums = mutable_data<double>(partial);
        }
        const Isa isa = chosen_isa();
        for_each_item(chain.S * groups,
                      [&](std::int64_t begin, std::int64_t end) { run_chain(isa, chain, begin, end); });
        if (!statistics) return {y, torch::stable::new_empty(x, {0}, ScalarType::Double)};

        const Tensor sums = torch::stable::new_zeros(x, {chain.S, 2, width}, ScalarType::Double);
        double* total = mutable_data<double>(sums);
        for (std::int64_t s = 0; s < chain.S; ++s, total += 2 * width) {
            const double* parts = chain.sums + s * groups * 2 * width;
            for (std::int64_t g = 0; g < groups; ++g) {
                for (std::int64_t c = 0; c < 2 * width; ++c) total[c] += parts[g * 2 * width + c];
            }
        }
        return {y, sums};
    }
};

std::tuple<Tensor, Tensor> ragged_conv_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& cin, const Tensor& cout, const Tensor& source,
    const Tensor& weight_source, const Image& image, std::int64_t kernel, std::int64_t stride,
    std::int64_t max_cin, std::int64_t max_cout, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation, const std::optional<Tensor>& shortcut,
    const std::optional<Tensor>& shortcut_source, const std::optional<Tensor>& input_scale,
    const std::optional<Tensor>& input_shift, const std::string& input_activation, bool statistics) {
    return with_storage_type("ragged_conv", x, [&](auto storage) {
        Arguments<decltype(storage)> arguments(x, "cin", cin, source, image, max_cin);
        arguments.normalise(input_scale, input_shift, input_activation, x);
        arguments.add(weight, weight_source, "cout", cout, max_cout, false, kernel, stride, scale, shift,
                      activation);
        return arguments.run(x, shortcut, shortcut_source, statistics);
    });
}

std::tuple<Tensor, Tensor> ragged_depthwise_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& channels, const Tensor& source,
    const Tensor& weight_source, const Image& image, std::int64_t kernel, std::int64_t stride,
    std::int64_t max_channels, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    const std::string& activation, const std::optional<Tensor>& input_scale,
    const std::optional<Tensor>& input_shift, const std::string& input_activation, bool statistics) {
    return with_storage_type("ragged_depthwise", x, [&](auto storage) {
        Arguments<decltype(storage)> arguments(x, "channels", channels, source, image, max_channels);
        arguments.normalise(input_scale, input_shift, input_activation, x);
        arguments.add(weight, weight_source, "channels", channels, max_channels, true, kernel, stride, scale,
                      shift, activation);
        return arguments.run(x, std::nullopt, std::nullopt, statistics);
    });
}

Tensor fused_block_cpu(const Tensor& x, const Tensor& channels, const Tensor& source,
                       const std::vector<Tensor>& weights, const std::vector<Tensor>& weight_sources,
                       const std::vector<Tensor>& widths, const std::vector<Tensor>& scales,
                       const std::vector<Tensor>& shifts, const Image& image, std::int64_t max_channels,
                       const Image& max_widths, const std::vector<bool>& depthwise, const Image& kernels,
                       const Image& strides, const std::vector<std::string>& activations,
                       const std::optional<Tensor>& shortcut, const std::optional<Tensor>& shortcut_source) {
    const std::size_t count = weights.size();
    STD_TORCH_CHECK(count >= 1 && count <= kMaxStages, "a block is one to ", kMaxStages, " convolutions");
    STD_TORCH_CHECK(weight_sources.size() == count && widths.size() == count && scales.size() == count &&
                        shifts.size() == count && max_widths.size() == count && depthwise.size() == count &&
                        kernels.size() == count && strides.size() == count && activations.size() == count,
                    "every list of a block must have an entry for every convolution");
    return with_storage_type("fused_block", x, [&](auto storage) {
        Arguments<decltype(storage)> arguments(x, "channels", channels, source, image, max_channels);
        for (std::size_t i = 0; i < count; ++i) {
            arguments.add(weights[i], weight_sources[i], "widths", widths[i], max_widths[i], depthwise[i],
                          kernels[i], strides[i], scales[i], shifts[i], activations[i]);
        }
        return std::get<0>(arguments.run(x, shortcut, shortcut_source, false));
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_conv", TORCH_BOX(&metaprune::ragged_conv_cpu));
    m.impl("ragged_depthwise", TORCH_BOX(&metaprune::ragged_depthwise_cpu));
    m.impl("fused_block", TORCH_BOX(&metaprune::fused_block_cpu));
}
