// ragged_depthwise on a GPU: channels last, 16 bytes of channels to a thread.
//
// A block takes a tile of pixels out by up to eight vectors of channels. Windows of 3 with stride 1 or 2, all
// that the networks have: the tile's pixels in, and a rim of one, go to shared memory once, all copies under
// way together; then a thread walks down one column of pixels, and each row it reads goes into every output
// that it is part of. Other windows: tap by tap from global memory.
//
// How a tile is cut follows from the subnetwork's own width (depthwise_plan.cuh), so that narrow subnetworks
// and small images fill blocks too. The grid is sized for the width with most tiles; blocks beyond a
// subnetwork's end at once. Proven by emulation on the CPU and by nvcc; not run on a GPU.

#include <algorithm>

#include "cuda/ragged_depthwise.h"
#include "depthwise_plan.cuh"
#include "thread.cuh"

namespace metaprune::cuda {

using namespace depthwise;

namespace {

// Numbers per channel, `otherwise` beyond the subnetwork's own: what lies there is not read.
template <int kCount>
__device__ __forceinline__ void per_channel(float (&value)[kCount], const float* row_of, std::int64_t row,
                                            int limit, int channel, int channels, float otherwise) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        value[i] =
            row_of != nullptr && channel + i < channels ? row_of[row * limit + channel + i] : otherwise;
    }
}

__device__ __forceinline__ float clamped(float value, Clamp clamp) {
    return smaller(larger(value, clamp.low), clamp.high);
}

// The epilogue and the sums of one thread's outputs. What it multiplies and adds lies in shared memory,
// behind the tile: registers are what limits the blocks of a multiprocessor. There is a barrier between the
// constructor and the first use.
template <typename T, bool kStatistics>
struct Finish {
    static constexpr int kCount = kPerVector<T>;
    const RaggedDepthwise<T>& args;
    const Part<T>& part;
    const float *scales, *shifts;  // of this thread's channels
    float sum[kCount], square[kCount];

    __device__ Finish(const RaggedDepthwise<T>& args, const Part<T>& part) : args(args), part(part) {
        auto* behind_tile = reinterpret_cast<float*>(shared_memory() + kShared);
        const int width = part.plan.vectors * kCount;
        for (int i = static_cast<int>(threadIdx.x); i < width; i += kThreads) {
            const int channel = part.plan.first + i;
            const std::int64_t at = static_cast<std::int64_t>(part.plan.s) * args.max_channels + channel;
            // What lies beyond a subnetwork's channels is not read.
            const bool known = channel < part.plan.channels;
            behind_tile[i] = known && args.scale != nullptr ? args.scale[at] : 1.0f;
            behind_tile[width + i] = known && args.shift != nullptr ? args.shift[at] : 0.0f;
        }
        scales = behind_tile + part.vector * kCount;
        shifts = scales + width;
        for (int i = 0; i < kCount; ++i) sum[i] = square[i] = 0.0f;
    }

    // What a sum of products begins with: shifted, unless sums over outputs are wanted of the bare
    // convolution.
    __device__ __forceinline__ void begin(float (&value)[kCount]) const {
        asm volatile("" ::: "memory");  // read again for every pixel, not kept
#pragma unroll
        for (int i = 0; i < kCount; ++i) value[i] = kStatistics ? 0.0f : shifts[i];
    }

    // For the same reason weights are scaled, or else outputs.
    __device__ __forceinline__ void scale(float (&value)[kCount]) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) value[i] *= scales[i];
    }

    // Where the channels of a pixel go.
    __device__ T* pixel(std::int64_t number) const {
        return args.y + part.plan.s * args.y_slot + number * part.plan.padded + part.channel();
    }

    __device__ __forceinline__ void store(T* to, float (&value)[kCount]) {
        if constexpr (kStatistics) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                sum[i] += value[i];
                square[i] += value[i] * value[i];
            }
            scale(value);
#pragma unroll
            for (int i = 0; i < kCount; ++i) value[i] += shifts[i];
        }
        store_vector(to, value, args.clamp);
    }

    // Adds up the sums of the block's threads, vector by vector in the order of their columns.
    __device__ void add_up() {
        if constexpr (kStatistics) {
            auto* of_walker = reinterpret_cast<float*>(shared_memory());
            const int width = part.plan.vectors * kCount;
            __syncthreads();
            if (part.walker >= 0) {
                float* mine = of_walker + part.walker * 2 * width + part.vector * kCount;
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    mine[i] = sum[i];
                    mine[width + i] = square[i];
                }
            }
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += kThreads) {
                const int channel = part.plan.first + i % width, which = i / width;
                if (channel >= part.plan.channels) continue;
                float total = 0.0f;
                for (int w = 0; w < part.plan.walkers; ++w) total += of_walker[w * 2 * width + i];
                const std::int64_t row = part.plan.s * args.tiles + part.plan.number;
                args.partials[(row * 2 + which) * args.max_channels + channel] = total;
            }
        }
    }
};

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[kPerVector<T>], const float (&a)[kPerVector<T>],
                                             const float (&b)[kPerVector<T>]) {
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) sum[i] += a[i] * b[i];
}

// Windows of 3: where the tile of a block lies, and its copy in shared memory.
template <typename T, int kStride>
struct Stage {
    static constexpr int kCount = kPerVector<T>;
    const RaggedDepthwise<T>& args;
    const Part<T>& part;
    T* tile;  // [images, in_rows, in_columns, vectors] vectors

    __device__ Stage(const RaggedDepthwise<T>& args, const Part<T>& part)
        : args(args), part(part), tile(reinterpret_cast<T*>(shared_memory())) {}

    // Calls visit(place in shared memory, place in `slot` of x, inside the image?) for the vectors this
    // thread copies: one column of pixels after another, from top to bottom.
    template <typename Visit>
    __device__ __forceinline__ void for_each(const T* slot, const Visit& visit) const {
        const Plan& plan = part.plan;
        const int in_rows = plan.in_rows, in_columns = plan.in_columns, pitch = plan.vectors * kCount;
        const int first_row = plan.top * kStride - 1;
        const std::int64_t below = static_cast<std::int64_t>(args.W) * plan.padded;
        for (int line = part.walker; line < plan.images * in_columns; line += plan.walkers) {
            const int of_tile = quotient(line, in_columns), column = rest(line, in_columns);
            const int n = plan.image + of_tile, ix = plan.left * kStride - 1 + column;
            const bool exists = n < args.N && ix >= 0 && ix < args.W;
            T* to = tile + (of_tile * in_rows * in_columns + column) * pitch + part.vector * kCount;
            const T* from = slot + (static_cast<std::int64_t>(n) * args.H + first_row) * below +
                            static_cast<std::int64_t>(ix) * plan.padded;
#pragma unroll 4
            for (int row = 0; row < in_rows; ++row, to += in_columns * pitch, from += below) {
                const auto iy = static_cast<unsigned>(first_row + row);
                visit(to, from, exists && iy < static_cast<unsigned>(args.H));
            }
        }
    }

    // Copies the tile, zero outside of the image, and takes it through the prologue.
    __device__ void load() const {
        if (part.walker >= 0) {
            const std::int64_t slot = args.source[part.plan.s];
            const T* x = args.x + slot * args.x_slot + part.channel();
            for_each(x, [](T* to, const T* from, bool inside) { copy_async(to, from, inside); });
            commit_copies();
            wait_for_copies<0>();
            if (args.input_scale != nullptr) normalise(slot, x);
        }
        __syncthreads();
    }

    // Rounded to T, as the reference's own input would be. A thread takes what it copied: no barrier before.
    __device__ void normalise(std::int64_t slot, const T* x) const {
        float scale[kCount], shift[kCount];
        per_channel(scale, args.input_scale, slot, args.max_channels, part.channel(), part.plan.channels,
                    0.0f);
        per_channel(shift, args.input_shift, slot, args.max_channels, part.channel(), part.plan.channels,
                    0.0f);
        for_each(x, [&](T* at, const T*, bool inside) {
            if (!inside) return;
            float value[kCount];
            load_vector(at, value);
#pragma unroll
            for (int i = 0; i < kCount; ++i) value[i] = value[i] * scale[i] + shift[i];
            store_vector(at, value, args.input_clamp);
        });
    }
};

template <typename T, int kStride, bool kStatistics>
__global__ void __launch_bounds__(kThreads, kStatistics ? kBlocks - 1 : kBlocks)
    staged_kernel(const RaggedDepthwise<T> args) {
    constexpr int kCount = kPerVector<T>;
    const Part<T> part(args, kStride);
    if (part.plan.number < 0) return;
    const Stage<T, kStride> stage(args, part);
    Finish<T, kStatistics> finish(args, part);
    stage.load();

    const Plan& plan = part.plan;
    const int column = rest(part.walker, plan.columns), image = quotient(part.walker, plan.columns);
    if (part.walker >= 0 && image < plan.images && column < plan.columns_here &&
        plan.image + image < args.N) {
        float weight[kTaps][kCount];
        const T* taps = args.weight + args.weight_source[plan.s] * args.weight_slot + part.channel();
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            load_vector(taps + tap * plan.padded, weight[tap]);
            if (!kStatistics) finish.scale(weight[tap]);
        }
        const int pitch = plan.vectors * kCount, in_pitch = plan.in_columns * pitch, rows = plan.rows_here;
        const T* at =
            stage.tile + image * plan.in_rows * in_pitch + column * kStride * pitch + part.vector * kCount;
        const std::int64_t out_pitch = static_cast<std::int64_t>(args.out_W) * plan.padded;
        T* to = finish.pixel((static_cast<std::int64_t>(plan.image + image) * args.out_H + plan.top) *
                                 args.out_W +
                             plan.left + column);
        const auto take_row = [&](const auto& take) {
#pragma unroll
            for (int j = 0; j < kWindow; ++j) {
                float value[kCount];
                load_vector(at + j * pitch, value);
                take(j, value);
            }
            at += in_pitch;
        };
        // `first` is the output that needs the next row in, `second` the one below it, which overlaps it.
        float first[kCount], second[kCount];
        finish.begin(first);
        take_row([&](int j, const auto& value) { multiply_add<T>(first, weight[j], value); });
        if constexpr (kStride == 1) {
            finish.begin(second);
            take_row([&](int j, const auto& value) {
                multiply_add<T>(first, weight[kWindow + j], value);
                multiply_add<T>(second, weight[j], value);
            });
        }
#pragma unroll kStatistics || kStride == 2 ? 1 : 3
        for (int row = 0; row < rows; ++row) {
            float third[kCount];
            if constexpr (kStride == 2) {
                take_row(
                    [&](int j, const auto& value) { multiply_add<T>(first, weight[kWindow + j], value); });
            }
            finish.begin(third);
            take_row([&](int j, const auto& value) {
                multiply_add<T>(first, weight[2 * kWindow + j], value);
                if (kStride == 1) multiply_add<T>(second, weight[kWindow + j], value);
                multiply_add<T>(third, weight[j], value);
            });
            finish.store(to, first);
            to += out_pitch;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                first[i] = kStride == 1 ? second[i] : third[i];
                second[i] = third[i];
            }
        }
    }
    finish.add_up();
}

template <typename T, bool kStatistics>
__global__ void __launch_bounds__(kThreads, kBlocks) direct_kernel(const RaggedDepthwise<T> args) {
    constexpr int kCount = kPerVector<T>;
    const Part<T> part(args, 0);
    if (part.plan.number < 0) return;
    Finish<T, kStatistics> finish(args, part);
    __syncthreads();
    if (part.walker >= 0) {
        const std::int64_t slot = args.source[part.plan.s];
        const T* x = args.x + slot * args.x_slot + part.channel();
        const T* taps = args.weight + args.weight_source[part.plan.s] * args.weight_slot + part.channel();
        float scale[kCount], shift[kCount];
        per_channel(scale, args.input_scale, slot, args.max_channels, part.channel(), part.plan.channels,
                    1.0f);
        per_channel(shift, args.input_shift, slot, args.max_channels, part.channel(), part.plan.channels,
                    0.0f);
        const int begin = part.plan.number * part.plan.columns,
                  end = at_most(begin + part.plan.columns, args.N * args.out_H * args.out_W);
        for (int pixel = begin + part.walker; pixel < end; pixel += part.plan.walkers) {
            const int left = pixel % args.out_W * args.stride - args.kernel / 2,
                      top = pixel / args.out_W % args.out_H * args.stride - args.kernel / 2;
            const std::int64_t image = static_cast<std::int64_t>(pixel / args.out_W / args.out_H) * args.H;
            float sum[kCount];
            finish.begin(sum);
            for (int tap = 0; tap < args.kernel * args.kernel; ++tap) {
                const int iy = top + tap / args.kernel, ix = left + tap % args.kernel;
                if (iy < 0 || iy >= args.H || ix < 0 || ix >= args.W) continue;
                float value[kCount], weight[kCount];
                load_vector(x + ((image + iy) * args.W + ix) * part.plan.padded, value);
                load_vector(taps + static_cast<std::int64_t>(tap) * part.plan.padded, weight);
                if (!kStatistics) finish.scale(weight);
                if (args.input_scale != nullptr) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i) {
                        value[i] = clamped(value[i] * scale[i] + shift[i], args.input_clamp);
                    }
                }
                multiply_add<T>(sum, weight, value);
            }
            finish.store(finish.pixel(pixel), sum);
        }
    }
    finish.add_up();
}

// The sums of all tiles in float64, in the order of the tiles.
constexpr int kTotalRows = 8;

template <typename T>
__global__ void total_kernel(const RaggedDepthwise<T> args, int stride) {
    const int s = static_cast<int>(blockIdx.y), which = static_cast<int>(blockIdx.z);
    const int thread = static_cast<int>(threadIdx.x), row = thread / kWarp;
    const int channel = static_cast<int>(blockIdx.x) * kWarp + thread % kWarp, channels = args.channels[s];
    const int padded = (channels + 7) / 8 * 8;
    const int tiles =
        channels == 0 ? 0 : tiling(padded / kPerVector<T>, args.N, args.out_H, args.out_W, stride).tiles();
    const float* parts = args.partials + (s * args.tiles * 2 + which) * args.max_channels + channel;
    double sum = 0.0;
    for (int tile = row; channel < channels && tile < tiles; tile += kTotalRows) {
        sum += static_cast<double>(parts[static_cast<std::int64_t>(tile) * 2 * args.max_channels]);
    }
    auto* of_row = reinterpret_cast<double*>(shared_memory());
    of_row[thread] = sum;
    __syncthreads();
    if (row > 0 || channel >= args.max_channels) return;
    for (int other = 1; other < kTotalRows; ++other) sum += of_row[other * kWarp + thread];
    args.sums[(static_cast<std::int64_t>(s) * 2 + which) * args.max_channels + channel] = sum;
}

// The stride of windows that are staged, 0 of others.
template <typename T>
int staged_stride(const RaggedDepthwise<T>& args) {
    return args.kernel == kWindow && args.stride <= 2 ? args.stride : 0;
}

template <typename T, bool kStatistics>
const char* convolve(const RaggedDepthwise<T>& args, dim3 grid, void* stream) {
    static_assert(kThreads * 2 * kPerVector<T> * static_cast<int>(sizeof(float)) <= kShared,
                  "sums take the place of the tile");
    const int stride = staged_stride(args);
    if (stride == 1)
        return launch(staged_kernel<T, 1, kStatistics>, grid, dim3{kThreads}, kBytes, stream, args);
    if (stride == 2)
        return launch(staged_kernel<T, 2, kStatistics>, grid, dim3{kThreads}, kBytes, stream, args);
    return launch(direct_kernel<T, kStatistics>, grid, dim3{kThreads}, kBytes, stream, args);
}

}  // namespace

template <typename T>
std::int64_t depthwise_tiles(const RaggedDepthwise<T>& args) {
    std::int64_t most = 0;
    for (int channels = 8; channels < args.max_channels + 8; channels += 8) {
        const Tiling t =
            tiling(channels / kPerVector<T>, args.N, args.out_H, args.out_W, staged_stride(args));
        most = std::max<std::int64_t>(most, t.tiles());
    }
    return most;
}

template <typename T>
const char* ragged_depthwise(const RaggedDepthwise<T>& args, void* stream) {
    const int stride = staged_stride(args);
    unsigned blocks = 0;
    for (int channels = 8; channels < args.max_channels + 8; channels += 8) {
        const Tiling t = tiling(channels / kPerVector<T>, args.N, args.out_H, args.out_W, stride);
        blocks = std::max(blocks, static_cast<unsigned>(t.tiles()) * t.chunks);
    }
    const auto S = static_cast<unsigned>(args.S);
    if (args.partials == nullptr) return convolve<T, false>(args, dim3{blocks, S}, stream);
    if (const char* wrong = convolve<T, true>(args, dim3{blocks, S}, stream)) return wrong;
    const dim3 grid{static_cast<unsigned>(ceil_div(args.max_channels, kWarp)), S, 2};
    return launch(total_kernel<T>, grid, dim3{kTotalRows * kWarp}, kTotalRows * kWarp * sizeof(double),
                  stream, args, stride);
}

#define INSTANTIATE(T)                                                   \
    template std::int64_t depthwise_tiles<T>(const RaggedDepthwise<T>&); \
    template const char* ragged_depthwise<T>(const RaggedDepthwise<T>&, void*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace metaprune::cuda
