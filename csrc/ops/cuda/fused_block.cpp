// Registers fused_block on a GPU, for the blocks that are one kernel there (kernels/fused_block/cuda.py).

#include "cuda/fused_block.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gpu.h"

namespace metaprune::cuda {
namespace {

using Integers = std::vector<std::int64_t>;

Tensor fused_block_cuda(const Tensor& x, const Tensor& channels, const Tensor& source,
                        const std::vector<Tensor>& weights, const std::vector<Tensor>& weight_sources,
                        const std::vector<Tensor>& widths, const std::vector<Tensor>& scales,
                        const std::vector<Tensor>& shifts, const Integers& image, std::int64_t max_channels,
                        const Integers& max_widths, const std::vector<bool>& depthwise,
                        const Integers& kernels, const Integers& strides,
                        const std::vector<std::string>& activations, const std::optional<Tensor>& shortcut,
                        const std::optional<Tensor>& shortcut_source) {
    const std::size_t count = weights.size();
    STD_TORCH_CHECK(count >= 1 && count <= kMaxStages, "a block is one to ", kMaxStages, " convolutions");
    STD_TORCH_CHECK(weight_sources.size() == count && widths.size() == count && scales.size() == count &&
                        shifts.size() == count && max_widths.size() == count && depthwise.size() == count &&
                        kernels.size() == count && strides.size() == count && activations.size() == count,
                    "every list of a block must have an entry for every convolution");
    STD_TORCH_CHECK(shortcut.has_value() == shortcut_source.has_value(),
                    "shortcut and shortcut_source must be given together or not at all");
    return with_gpu_storage_type("fused_block", x, [&](auto storage) {
        using T = decltype(storage);
        const Beside beside(x);
        Chain<T> chain{};
        chain.S = expect_gpu_count("channels", channels);
        chain.x = beside.buffer<T>("x", x, expect_slot(image, max_channels));
        chain.N = image[0];
        chain.H = image[1];
        chain.W = image[2];
        expect_32_bits("the number of pixels", chain.N * chain.H * chain.W);
        chain.max_channels = expect_32_bits("max_channels", max_channels);
        chain.source = beside.integers("source", source, chain.S);
        chain.channels = beside.integers("channels", channels, chain.S);
        std::vector<Tensor> kept;  // scales and shifts in float32, until the kernel is queued
        std::int64_t in = max_channels;
        for (std::size_t i = 0; i < count; ++i) {
            const std::int64_t width = max_widths[i], taps = kernels[i] * kernels[i];
            expect_window(kernels[i], strides[i]);
            STD_TORCH_CHECK(width >= 1, "max_widths must be at least 1");
            Stage<T>& stage = chain.stage[chain.stages++];
            stage.depthwise = depthwise[i];
            stage.kernel = kernels[i];
            stage.stride = strides[i];
            stage.clamp = expect_activation(activations[i]);
            stage.max_channels = expect_32_bits("max_widths", width);
            stage.channels = beside.integers("widths", widths[i], chain.S);
            stage.weight_slot =
                depthwise[i] ? taps * round_up(width, 8) : round_up(width, kPanel) * taps * in;
            stage.weight = beside.buffer<T>("weight", weights[i], stage.weight_slot);
            stage.weight_source = beside.integers("weight_source", weight_sources[i], chain.S);
            kept.push_back(beside.floats("scale", scales[i], {chain.S, width}));
            stage.scale = data<float>(kept.back());
            kept.push_back(beside.floats("shift", shifts[i], {chain.S, width}));
            stage.shift = data<float>(kept.back());
            in = width;
        }
        const Integers out = {chain.N, chain.size(chain.H, chain.stages), chain.size(chain.W, chain.stages)};
        const std::int64_t slot = expect_slot(out, max_widths[count - 1]);
        if (shortcut) {
            chain.shortcut = beside.buffer<T>("shortcut", *shortcut, slot);
            chain.shortcut_source = beside.integers("shortcut_source", *shortcut_source, chain.S);
        }
        const Queue queue(x);
        const Tensor y = torch::stable::new_empty(x, {chain.S, slot});
        chain.y = mutable_data<T>(y);
        expect_launched("fused_block", fused_block(chain, queue.stream()));
        return y;
    });
}

}  // namespace
}  // namespace metaprune::cuda

STABLE_TORCH_LIBRARY_IMPL(metaprune_cuda, METAPRUNE_GPU, m) {
    m.impl("fused_block", TORCH_BOX(&metaprune::cuda::fused_block_cuda));
}
