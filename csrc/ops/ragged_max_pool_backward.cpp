// Registers ragged_max_pool_backward on the CPU. Schema and fake kernel are declared in kernels/ops.py.

#include "ragged_max_pool_backward.h"

#include <cstdint>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "buffers.h"
#include "items.h"
#include "readers.h"

namespace metaprune {
namespace {

Tensor ragged_max_pool_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& channels,
                                    const Tensor& source, const std::vector<std::int64_t>& image,
                                    std::int64_t kernel, std::int64_t stride, std::int64_t max_channels) {
    return with_storage_type("ragged_max_pool_backward", x, [&](auto storage) {
        using T = decltype(storage);
        const ScalarType dtype = x.scalar_type();
        expect_window(kernel, stride);
        const std::int64_t S = expect_count("channels", channels), slot = expect_slot(image, max_channels);
        RaggedMaxPoolBackward<T> args{};
        RaggedMaxPool<T>& pool = args.pool;
        pool.S = S;
        pool.N = image[0];
        pool.H = image[1];
        pool.W = image[2];
        pool.kernel = kernel;
        pool.stride = stride;
        pool.max_channels = max_channels;
        args.slots = expect_buffer("x", x, dtype, slot);
        pool.source = expect_slots("source", source, S, args.slots);
        pool.channels = expect_widths("channels", channels, S, max_channels);
        pool.x = data<T>(x);
        const Readers readers = readers_of(pool.source, S, args.slots, "channels", pool.channels);
        args.first_reader = readers.first.data();
        args.readers = readers.readers.data();
        expect("grad", grad, dtype,
               {S, expect_slot({pool.N, pool.size(pool.H), pool.size(pool.W)}, max_channels)});
        args.grad = data<T>(grad);
        const Tensor grad_x = new_buffer(x, {args.slots, slot});
        args.grad_x = mutable_data<T>(grad_x);
        clear_unread(args.grad_x, slot, readers);
        const Isa isa = chosen_isa();
        for_each_item(args.slots * pool.N, [&](std::int64_t begin, std::int64_t end) {
            ragged_max_pool_backward(isa, args, begin, end);
        });
        return grad_x;
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_max_pool_backward", TORCH_BOX(&metaprune::ragged_max_pool_backward_cpu));
}
