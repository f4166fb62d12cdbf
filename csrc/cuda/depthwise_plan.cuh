// How ragged_depthwise.cu cuts the pixels and channels of a subnetwork into blocks: from the subnetwork's own
// numbers, so that it is computed in the same order whatever is computed beside it.

#pragma once

#include "cuda/ragged_depthwise.h"
#include "thread.cuh"

namespace metaprune::cuda::depthwise {

// What is chosen, not computed. 36 KiB and 128 registers a thread let four blocks share a multiprocessor of
// any GPU: while one computes, three load, some 100 KB where 30 KB hide the latency of an H200's memory.
constexpr int kThreads = 128;
constexpr int kBlocks = 4;
constexpr int kVectors = 8;
constexpr int kShared = 36 * 1024;
constexpr int kPixelsPerThread = 8;  // of windows that are not staged
constexpr int kWindow = 3, kTaps = kWindow * kWindow;

// Of numbers that are not negative: half the instructions of a division that allows for others.
__host__ __device__ constexpr int quotient(int n, int d) {
    return static_cast<int>(static_cast<unsigned>(n) / static_cast<unsigned>(d));
}
__host__ __device__ constexpr int rest(int n, int d) { return n - quotient(n, d) * d; }
__host__ __device__ constexpr int ceil_div(int n, int d) { return quotient(n + d - 1, d); }
__host__ __device__ constexpr int at_most(int n, int limit) { return n < limit ? n : limit; }
__host__ __device__ constexpr int at_least(int n, int limit) { return n > limit ? n : limit; }

// How the pixels out of a subnetwork of `vectors` are cut up.
struct Tiling {
    int chunks, vectors;        // of channels: their number, and the vectors of one (the last may have fewer)
    int columns, rows, images;  // of a tile
    int across, down, along;    // tiles
    int in_columns;             // of a tile with its rim

    __host__ __device__ int tiles() const { return across * down * along; }
};

// Stride 0 stands for windows that are not staged: a tile is a run of pixels.
__host__ __device__ inline Tiling tiling(int all_vectors, int N, int out_H, int out_W, int stride) {
    Tiling t{};
    t.chunks = ceil_div(all_vectors, kVectors);
    t.vectors = ceil_div(all_vectors, t.chunks);
    const int walkers = quotient(kThreads, t.vectors);
    if (stride == 0) {
        t.columns = walkers * kPixelsPerThread;
        t.rows = t.images = t.down = t.along = 1;
        t.across = ceil_div(N * out_H * out_W, t.columns);
        return t;
    }
    t.across = ceil_div(out_W, walkers);
    t.columns = ceil_div(out_W, t.across);
    t.images = quotient(walkers, t.columns);
    t.in_columns = (t.columns - 1) * stride + kWindow;
    const int fit = quotient(kShared, t.in_columns * t.images * t.vectors * kVectorBytes);
    t.down = ceil_div(out_H, (fit - kWindow) / stride + 1);
    t.rows = ceil_div(out_H, t.down);
    t.along = ceil_div(N, t.images);
    return t;
}

// A block's part of a subnetwork, from the subnetwork's own numbers.
struct Plan : Tiling {
    int s, channels, padded;
    int number, left, top, image;          // the tile, -1 where there is none, and its first pixel
    int columns_here, rows_here, in_rows;  // of the tile, without what lies beyond the image
    int first, vectors_here, walkers;      // first channel and vectors of the chunk; columns walked at once

    template <typename T>
    __host__ __device__ Plan(const RaggedDepthwise<T>& args, int stride, int block, int s, int channels)
        : Tiling(tiling(ceil_div(at_least(channels, 1), 8) * 8 / kPerVector<T>, args.N, args.out_H,
                        args.out_W, stride)),
          s(s),
          channels(channels),
          padded(ceil_div(channels, 8) * 8) {
        const int chunk = rest(block, chunks), row = quotient(quotient(block, chunks), across);
        number = quotient(block, chunks);
        left = rest(number, across) * columns;
        top = rest(row, down) * rows;
        image = quotient(row, down) * images;
        first = chunk * vectors * kPerVector<T>;
        columns_here = at_most(columns, args.out_W - left);
        rows_here = at_most(rows, args.out_H - top);
        in_rows = (rows_here - 1) * stride + kWindow;
        // The chunks are as even as may be: only the last can be short.
        vectors_here = at_most(vectors, (padded - first) / kPerVector<T>);
        walkers = quotient(kThreads, vectors);
        // One without channels is not to be computed.
        if (channels == 0 || number >= tiles()) number = -1;
    }
};

// Shared memory: the tile, or sums; numbers per channel; the plan.
constexpr int kNumbers = 2 * kVectors * 8 * static_cast<int>(sizeof(float));
constexpr int kBytes = kShared + kNumbers + static_cast<int>(sizeof(Plan));

// A block's plan, which one thread makes for all: its divisions are a tenth of a thread's work, and in shared
// memory it takes no registers. And this thread's place in it.
template <typename T>
struct Part {
    const Plan& plan;
    int vector, walker;  // the latter -1 if there is nothing to do

    __device__ Part(const RaggedDepthwise<T>& args, int stride) : plan(made(args, stride)) {
        vector = rest(static_cast<int>(threadIdx.x), plan.vectors);
        walker = quotient(static_cast<int>(threadIdx.x), plan.vectors);
        if (walker >= plan.walkers || vector >= plan.vectors_here) walker = -1;
    }

    __device__ static const Plan& made(const RaggedDepthwise<T>& args, int stride) {
        auto* plan = reinterpret_cast<Plan*>(shared_memory() + kShared + kNumbers);
        if (threadIdx.x == 0) {
            const int s = static_cast<int>(blockIdx.y);
            *plan = Plan(args, stride, static_cast<int>(blockIdx.x), s, args.channels[s]);
        }
        __syncthreads();
        return *plan;
    }

    // This thread's first channel.
    __device__ int channel() const { return plan.first + vector * kPerVector<T>; }
};

}  // namespace metaprune::cuda::depthwise
