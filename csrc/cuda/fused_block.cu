// Launches fused_block.cuh.

#include "cuda/fused_block.h"
#include "fused_block.cuh"

namespace metaprune::cuda {
namespace {

template <typename T, bool EXPANDS>
__global__ void __launch_bounds__(kMostThreads)
    fused_block_kernel(Chain<T> chain, BlockTile tile, BlockMemory memory) {
    compute_tile<T, EXPANDS>(chain, tile, memory, shared_memory());
}

template <typename T>
BlockShape shape_of(const Chain<T>& chain) {
    const bool expands = chain.stages == 3;
    return {static_cast<int>(chain.H), static_cast<int>(chain.W),
            static_cast<int>(chain.stage[chain.stages - 2].stride),
            expands ? static_cast<int>(chain.max_channels) : 0,
            static_cast<int>(chain.stage[chain.stages - 1].max_channels)};
}

}  // namespace

template <typename T>
const char* why_not_fused(const Chain<T>& chain) {
    if (chain.stages != 2 && chain.stages != 3) return "a fused block is two or three convolutions";
    const int windowed = chain.stages - 2;
    for (int i = 0; i < chain.stages; ++i) {
        const Stage<T>& stage = chain.stage[i];
        const bool known =
            i == windowed ? stage.depthwise && stage.kernel == 3 && (stage.stride == 1 || stage.stride == 2)
                          : !stage.depthwise && stage.kernel == 1 && stage.stride == 1;
        if (!known) return "a fused block is [1×1,] depthwise 3×3 of stride 1 or 2, 1×1";
        if (stage.scale == nullptr || stage.shift == nullptr) return "a fused block has scales and shifts";
    }
    if (chain.stages == 3 && chain.max_channels > kMostExpanded)
        return "a fused block expands at most 256 channels";
    return nullptr;
}

template <typename T>
const char* fused_block(const Chain<T>& chain, void* stream) {
    if (const char* reason = why_not_fused(chain)) return reason;
    const BlockShape shape = shape_of(chain);
    const BlockTile tile = choose_block_tile<T>(shape);
    if (tile.images == 0) return "no tile of this block fits the shared memory";
    const std::int64_t images = (chain.N + tile.images - 1) / tile.images;
    const std::int64_t tiles = images * ceil_div(shape.out(shape.height), tile.rows) *
                               ceil_div(shape.out(shape.width), tile.columns);
    if (chain.S > 65535 || tiles > std::numeric_limits<std::int32_t>::max())
        return "too many tiles for a launch";
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(chain.S),
                    static_cast<unsigned>(ceil_div(shape.max_out, tile.width_out)));
    const BlockMemory memory = block_memory<T>(tile);
    const auto kernel = chain.stages == 3 ? fused_block_kernel<T, true> : fused_block_kernel<T, false>;
    return launch(kernel, grid, dim3(static_cast<unsigned>(tile.threads())),
                  static_cast<std::size_t>(memory.bytes), stream, chain, tile, memory);
}

#define METAPRUNE_FUSED_BLOCK(T)                            \
    template const char* why_not_fused<T>(const Chain<T>&); \
    template const char* fused_block<T>(const Chain<T>&, void*);
METAPRUNE_FUSED_BLOCK(float)
METAPRUNE_FUSED_BLOCK(BFloat16)
METAPRUNE_FUSED_BLOCK(Float16)

}  // namespace metaprune::cuda
