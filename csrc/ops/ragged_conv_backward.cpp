// Registers ragged_conv_backward on the CPU. Schema, fake kernel and gradient are declared in kernels/ops.py.

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "buffers.h"
#include "convolution_gradient.h"
#include "items.h"
#include "readers.h"

namespace metaprune {
namespace {

using Image = std::vector<std::int64_t>;
using Numbers = std::vector<double>;

template <typename T>
std::vector<GradientItem> items_of(const ConvolutionGradient<T>& args, const Readers& readers) {
    std::vector<GradientItem> items;
    const auto end = [&](std::int64_t g, std::int64_t group) {
        return (g + 1) * group < args.N ? (g + 1) * group : args.N;
    };
    const std::int64_t group = args.cut.weight_group, input_group = args.cut.input_group;
    for (std::int64_t s = 0; s < args.S && !args.cut.together; ++s) {
        for (std::int64_t first = 0; first < args.cin[s]; first += args.cut.channels) {
            const std::int64_t last =
                first + args.cut.channels < args.cin[s] ? first + args.cut.channels : args.cin[s];
            for (std::int64_t g = 0; g < args.groups(group); ++g)
                items.push_back({args.source[s], s, g * group, end(g, group), first, last, g, false, 0});
        }
    }
    for (std::int64_t slot = 0; slot < args.slots && (args.cut.together || args.grad_x != nullptr); ++slot) {
        const std::int64_t s = readers.any(slot);
        if (s < 0) continue;
        const std::int64_t last = args.cut.together ? args.cin[s] : 0;
        for (std::int64_t g = 0; g < args.groups(input_group); ++g) {
            items.push_back(
                {slot, -1, g * input_group, end(g, input_group), 0, last, g, args.grad_x != nullptr, g});
        }
    }
    return items;
}

// Elements of the front of a slot of the weights of subnetwork s.
template <typename T>
std::int64_t front(const ConvolutionGradient<T>& args, std::int64_t s) {
    return round_up(args.cout[s], kPanel) * args.taps() * round_up(args.cin[s], kPerWord<T>);
}

// Zeros from the front of a slot on.
template <typename T>
void clear_behind(const Tensor& tensor, std::int64_t slot, std::int64_t front) {
    T* to = mutable_data<T>(tensor) + slot * tensor.size(1);
    std::memset(to + front, 0, static_cast<std::size_t>(tensor.size(1) - front) * sizeof(T));
}

// The gradients of input_shift (row 0) or input_scale (row 1): the sums of all groups, in order.
template <typename T>
Tensor add_sums(const ConvolutionGradient<T>& args, const Tensor& like, std::int64_t row,
                const Readers& readers) {
    const Tensor total = torch::stable::new_empty(like, {args.slots, args.max_cin}, ScalarType::Float);
    for (std::int64_t slot = 0; slot < args.slots; ++slot) {
        const std::int64_t groups = readers.any(slot) < 0 ? 0 : args.groups(args.cut.input_group);
        float* to = mutable_data<float>(total) + slot * args.max_cin;
        for (std::int64_t c = 0; c < args.max_cin; ++c) {
            double sum = 0.0;
            for (std::int64_t g = 0; g < groups; ++g)
                sum += args.sums[((slot * groups + g) * 2 + row) * args.max_cin + c];
            to[c] = static_cast<float>(sum);
        }
    }
    return in_dtype(total, like.scalar_type());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients ragged_conv_backward_cpu(const std::optional<Tensor>& grad_y,
                                   const std::optional<Tensor>& grad_sums, const Tensor& y, const Tensor& x,
                                   const Tensor& weight, const Tensor& cin, const Tensor& cout,
                                   const Tensor& source, const Tensor& weight_source, const Image& image,
                                   std::int64_t kernel, std::int64_t stride, std::int64_t max_cin,
                                   std::int64_t max_cout, const std::optional<Tensor>& input_scale,
                                   const std::optional<Tensor>& input_shift,
                                   const std::string& input_activation, bool needs_x) {
    return with_storage_type("ragged_conv_backward", x, [&](auto storage) -> Gradients {
        using T = decltype(storage);
        const ScalarType dtype = x.scalar_type();
        ConvolutionGradient<T> args{};
        args.slots = expect_buffer("x", x, dtype, expect_slot(image, max_cin));
        args.S = expect_count("cin", cin);
        args.N = image[0];
        args.H = image[1];
        args.W = image[2];
        expect_window(kernel, stride);
        STD_TORCH_CHECK(max_cout >= 1 && max_cout <= (1 << 24), "channels must be 1..", 1 << 24);
        args.kernel = kernel;
        args.stride = stride;
        args.out_H = (args.H + kernel / 2 * 2 - kernel) / stride + 1;
        args.out_W = (args.W + kernel / 2 * 2 - kernel) / stride + 1;
        args.max_cin = max_cin;
        args.max_cout = max_cout;
        args.cin = expect_widths("cin", cin, args.S, max_cin);
        args.cout = expect_widths("cout", cout, args.S, max_cout);
        args.source = expect_slots("source", source, args.S, args.slots);
        const std::int64_t weight_slots = expect_buffer("weight", weight, dtype, args.weight_slot());
        args.weight_source = expect_slots("weight_source", weight_source, args.S, weight_slots);
        const Readers readers = readers_of(args.source, args.S, args.slots, "cin", args.cin);
        const Readers weight_readers = readers_of(args.weight_source, args.S, weight_slots, "cin", args.cin);
        static_cast<void>(readers_of(args.weight_source, args.S, weight_slots, "cout", args.cout));
        const std::int64_t out_slot = args.N * args.out_H * args.out_W * round_up(max_cout, 8);
        expect("y", y, dtype, {args.S, out_slot});
        args.x = data<T>(x);
        args.y = data<T>(y);
        args.weight = data<T>(weight);
        if (grad_y) {
            expect("grad_y", *grad_y, dtype, {args.S, out_slot});
            args.grad_y = data<T>(*grad_y);
        }
        if (grad_sums) {
            expect("grad_sums", *grad_sums, ScalarType::Double, {args.S, 2, max_cout});
            args.grad_sums = data<double>(*grad_sums);
        }
        STD_TORCH_CHECK(input_scale.has_value() == input_shift.has_value(),
                        "input_scale and input_shift must be given together or not at all");
        STD_TORCH_CHECK(input_scale.has_value() || input_activation == "none",
                        "an input_activation needs an input_scale");
        args.input_clamp = expect_activation(input_activation);
        std::optional<Tensor> scale, shift;
        if (input_scale) {
            scale = expect_floats("input_scale", *input_scale, dtype, {args.slots, max_cin});
            shift = expect_floats("input_shift", *input_shift, dtype, {args.slots, max_cin});
            args.input_scale = data<float>(*scale);
            args.input_shift = data<float>(*shift);
        }
        args.cut = cut_gradient(args);
        const Isa isa = chosen_isa();

        const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
        Tensor grad_x, turned;
        Numbers sums;
        if (needs_x) {
            grad_x = new_buffer(x, {args.slots, x.size(1)});
            args.grad_x = mutable_data<T>(grad_x);
            // With a stride the pixels of a strip are not finished one after another.
            args.streams =
                stride == 1 && past_caches(elements_read(readers, args.cin, args.N * args.H * args.W) *
                                           static_cast<std::int64_t>(sizeof(T)));
            turned = new_floats(x, {weight_slots, args.turned_slot()});
            args.turned = turned.mutable_data_ptr();
            const std::int64_t panels = round_up(max_cin, kPanel) / kPanel;
            for_each_item(weight_slots * panels, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                    const std::int64_t s = weight_readers.any(i / panels);
                    if (s >= 0 && i % panels * kPanel < args.cin[s])
                        turn_weights(isa, args, i / panels, s, i % panels);
                }
            });
            clear_unread(args.grad_x, x.size(1), readers);
        }
        if (needs_x && input_scale) {
            sums.resize(args.slots * args.groups(args.cut.input_group) * 2 * max_cin);
            args.sums = sums.data();
        }
        std::vector<std::int64_t> part_of(static_cast<std::size_t>(args.S));
        std::int64_t floats_of_parts = 0;
        for (std::int64_t s = 0; s < args.S; ++s) {
            part_of[static_cast<std::size_t>(s)] = floats_of_parts;
            floats_of_parts += args.part(s) * args.groups(args.cut.weight_group);
        }
        const Tensor parts = new_floats(x, {floats_of_parts});
        args.parts = mutable_data<float>(parts);
        args.part_of = part_of.data();
        const std::vector<GradientItem> items = items_of(args, readers);
        for_each_item(static_cast<std::int64_t>(items.size()), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i)
                run_gradient(isa, args, items[static_cast<std::size_t>(i)]);
        });

        const Tensor grad_weight = new_buffer(weight, {weight_slots, args.weight_slot()});
        args.grad_weight = mutable_data<T>(grad_weight);
        const std::int64_t panels = round_up(max_cin, kPanel) / kPanel;
        for_each_item(weight_slots * panels, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                const std::int64_t slot = i / panels, s = weight_readers.any(slot);
                if (s >= 0 && i % panels * kPanel < args.cin[s]) add_parts(isa, args, slot, s, i % panels);
            }
        });
        for (std::int64_t slot = 0; slot < weight_slots; ++slot) {
            const std::int64_t s = weight_readers.any(slot);
            clear_behind<T>(grad_weight, slot, s < 0 ? 0 : front(args, s));
        }
        if (!needs_x) return {nothing(), grad_weight, nothing(), nothing()};
        if (!input_scale) return {grad_x, grad_weight, nothing(), nothing()};
        return {grad_x, grad_weight, add_sums(args, *input_scale, 1, readers),
                add_sums(args, *input_shift, 0, readers)};
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_conv_backward", TORCH_BOX(&metaprune::ragged_conv_backward_cpu));
}
