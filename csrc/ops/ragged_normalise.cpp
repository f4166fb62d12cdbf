// Registers ragged_normalise on the CPU. Schema, fake kernel and gradient are declared in kernels/ops.py.

#include "ragged_normalise.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "buffers.h"
#include "items.h"

namespace metaprune {
namespace {

Tensor ragged_normalise_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& channels,
                            const Tensor& source, const std::vector<std::int64_t>& image,
                            std::int64_t max_channels, const std::string& activation,
                            const std::optional<Tensor>& shortcut,
                            const std::optional<Tensor>& shortcut_source) {
    return with_storage_type("ragged_normalise", x, [&](auto storage) {
        using T = decltype(storage);
        const ScalarType dtype = x.scalar_type();
        const std::int64_t S = expect_count("channels", channels), slot = expect_slot(image, max_channels);
        const Tensor scales = expect_floats("scale", scale, dtype, {S, max_channels});
        const Tensor shifts = expect_floats("shift", shift, dtype, {S, max_channels});
        RaggedNormalise<T> args{};
        args.S = S;
        args.pixels = slot / round_up(max_channels, 8);
        args.max_channels = max_channels;
        args.source = expect_slots("source", source, S, expect_buffer("x", x, dtype, slot));
        args.channels = expect_widths("channels", channels, S, max_channels);
        args.x = data<T>(x);
        args.scale = data<float>(scales);
        args.shift = data<float>(shifts);
        args.clamp = expect_activation(activation);
        STD_TORCH_CHECK(shortcut.has_value() == shortcut_source.has_value(),
                        "shortcut and shortcut_source must be given together or not at all");
        if (shortcut) {
            const std::int64_t slots = expect_buffer("shortcut", *shortcut, dtype, slot);
            args.shortcut = data<T>(*shortcut);
            args.shortcut_source = expect_slots("shortcut_source", *shortcut_source, S, slots);
        }
        const Tensor y = new_buffer(x, {S, slot});
        args.y = mutable_data<T>(y);
        const Isa isa = chosen_isa();
        for_each_item(S * args.chunks(),
                      [&](std::int64_t begin, std::int64_t end) { ragged_normalise(isa, args, begin, end); });
        return y;
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_normalise", TORCH_BOX(&metaprune::ragged_normalise_cpu));
}
