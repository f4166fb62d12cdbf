// Registers ragged_normalise_backward on the CPU. Schema and fake kernel are declared in kernels/ops.py.

#include "ragged_normalise_backward.h"

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

SlotReaders pointers(const Readers& readers) {
    return {readers.slots(), readers.first.data(), readers.readers.data()};
}

// The gradient of shift (part 0) or scale (part 1), [S, max_channels].
template <typename T>
Tensor channel_gradient(const RaggedNormaliseBackward<T>& args, const double* sums, std::int64_t part,
                        const Tensor& like) {
    const Tensor grad = torch::stable::new_zeros(like, {args.S, args.max_channels}, ScalarType::Float);
    auto* to = mutable_data<float>(grad);
    for (std::int64_t s = 0; s < args.S; ++s, to += args.max_channels) {
        for (std::int64_t c = 0; c < args.channels[s]; ++c) {
            double total = 0;
            for (std::int64_t i = 0; i < args.chunks(); ++i) {
                total += sums[((s * args.chunks() + i) * 2 + part) * args.padded() + c];
            }
            to[c] = static_cast<float>(total);
        }
    }
    return in_dtype(grad, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ragged_normalise_backward_cpu(
    const Tensor& grad, const Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& shift,
    const Tensor& channels, const Tensor& source, const std::vector<std::int64_t>& image,
    std::int64_t max_channels, const std::string& activation, const std::optional<Tensor>& shortcut,
    const std::optional<Tensor>& shortcut_source) {
    return with_storage_type("ragged_normalise_backward", x, [&](auto storage) {
        using T = decltype(storage);
        const ScalarType dtype = x.scalar_type();
        const std::int64_t S = expect_count("channels", channels), slot = expect_slot(image, max_channels);
        RaggedNormaliseBackward<T> args{};
        args.S = S;
        args.pixels = slot / round_up(max_channels, 8);
        args.max_channels = max_channels;
        expect("grad", grad, dtype, {S, slot});
        expect("y", y, dtype, {S, slot});
        args.grad = data<T>(grad);
        args.y = data<T>(y);
        args.clamp = expect_activation(activation);
        args.channels = expect_widths("channels", channels, S, max_channels);
        const std::int64_t slots = expect_buffer("x", x, dtype, slot);
        const std::int32_t* sources = expect_slots("source", source, S, slots);
        const Readers readers = readers_of(sources, S, slots, "channels", args.channels);
        const Tensor scales = expect_floats("scale", scale, dtype, {S, max_channels});
        static_cast<void>(expect_floats("shift", shift, dtype, {S, max_channels}));

        NormaliseGradients<T> to{};
        to.x = data<T>(x);
        to.scale = data<float>(scales);
        to.readers = pointers(readers);
        const Tensor grad_x = new_buffer(x, {slots, slot});
        to.grad_x = mutable_data<T>(grad_x);
        clear_unread(to.grad_x, slot, readers);
        std::vector<double> sums(static_cast<std::size_t>(S * args.chunks() * 2 * args.padded()));
        to.sums = sums.data();

        STD_TORCH_CHECK(shortcut.has_value() == shortcut_source.has_value(),
                        "shortcut and shortcut_source must be given together or not at all");
        Tensor grad_shortcut;
        Readers shortcut_readers;
        std::vector<std::int32_t> alone;
        if (shortcut) {
            const std::int64_t shortcut_slots = expect_buffer("shortcut", *shortcut, dtype, slot);
            const std::int32_t* from = expect_slots("shortcut_source", *shortcut_source, S, shortcut_slots);
            shortcut_readers = readers_of(from, S, shortcut_slots, "channels", args.channels);
            for (std::int64_t s = 0; s < S; ++s) {
                alone.push_back(shortcut_readers.count(from[s]) == 1 ? from[s] : -1);
            }
            to.shortcut = alone.data();
            grad_shortcut = new_buffer(x, {shortcut_slots, slot});
            to.grad_shortcut = mutable_data<T>(grad_shortcut);
            clear_unread(to.grad_shortcut, slot, shortcut_readers);
        }
        const Isa isa = chosen_isa();
        for_each_item(slots * args.chunks(), [&](std::int64_t begin, std::int64_t end) {
            ragged_normalise_backward(isa, args, to, begin, end);
        });
        if (shortcut) {
            const SlotReaders shared = pointers(shortcut_readers);
            for_each_item(shared.slots * args.chunks(), [&](std::int64_t begin, std::int64_t end) {
                ragged_shortcut_backward(isa, args, shared, to.grad_shortcut, begin, end);
            });
        } else {
            grad_shortcut = torch::stable::new_empty(x, {0});
        }
        return std::tuple(grad_x, channel_gradient(args, to.sums, 1, scale),
                          channel_gradient(args, to.sums, 0, shift), grad_shortcut);
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_normalise_backward", TORCH_BOX(&metaprune::ragged_normalise_backward_cpu));
}
