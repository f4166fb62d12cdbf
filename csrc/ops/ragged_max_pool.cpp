// Registers ragged_max_pool on the CPU. Schema, fake kernel and gradient are declared in kernels/ops.py.

#include "ragged_max_pool.h"

#include <cstdint>
#include <limits>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "buffers.h"
#include "items.h"

namespace metaprune {
namespace {

Tensor ragged_max_pool_cpu(const Tensor& x, const Tensor& channels, const Tensor& source,
                           const std::vector<std::int64_t>& image, std::int64_t kernel, std::int64_t stride,
                           std::int64_t max_channels) {
    return with_storage_type("ragged_max_pool", x, [&](auto storage) {
        using T = decltype(storage);
        constexpr std::int64_t kLimit = std::numeric_limits<std::int32_t>::max();
        STD_TORCH_CHECK(kernel >= 1 && kernel <= kLimit && stride >= 1 && stride <= kLimit,
                        "kernel and stride must be in 1..", kLimit, ", got ", kernel, ", ", stride);
        const std::int64_t S = expect_count("channels", channels), slot = expect_slot(image, max_channels);
        RaggedMaxPool<T> args{};
        args.S = S;
        args.N = image[0];
        args.H = image[1];
        args.W = image[2];
        args.kernel = kernel;
        args.stride = stride;
        args.max_channels = max_channels;
        args.source = expect_slots("source", source, S, expect_buffer("x", x, x.scalar_type(), slot));
        args.channels = expect_widths("channels", channels, S, max_channels);
        args.x = data<T>(x);
        const Tensor y =
            new_buffer(x, {S, expect_slot({args.N, args.size(args.H), args.size(args.W)}, max_channels)});
        args.y = mutable_data<T>(y);
        const Isa isa = chosen_isa();
        for_each_item(S * args.N,
                      [&](std::int64_t begin, std::int64_t end) { ragged_max_pool(isa, args, begin, end); });
        return y;
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("ragged_max_pool", TORCH_BOX(&metaprune::ragged_max_pool_cpu));
}
