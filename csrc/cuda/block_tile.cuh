// How fused_block is cut up: the tile of pixels that a block of threads takes, and what it has in shared
// memory.
//
// Legend: C channels.

#pragma once

#include <cstdint>
#include <limits>

#include "convolution.h"
#include "thread.cuh"

namespace metaprune::cuda {

// Bytes of the inner channels of a pixel that are in shared memory at a time: a slice is 32 channels, 16 in
// float32.
inline constexpr int kSliceBytes = 64;
// A warp's share of the projection: pixels, and channels out.
inline constexpr int kWarpRows = 32, kWarpColumns = 64;
// Pixels of a column that a thread convolves at a time.
inline constexpr int kRun = 4;
// Most threads of a block: it leaves each 128 registers.
inline constexpr int kMostThreads = 512;
// What a block may have on sm_80, and with what two of 256 threads share a multiprocessor of sm_90.
inline constexpr int kSharedMost = 163 * 1024, kSharedForTwo = 113 * 1024;
// Room for what says which tile it is.
inline constexpr int kPlace = 64;
// An expansion of more channels has no tile that fits in float32.
inline constexpr int kMostExpanded = 256;

__host__ __device__ constexpr int rounded_up(int n, int multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
__host__ __device__ constexpr int ceil_div(int n, int d) { return (n + d - 1) / d; }

// Rows of 16 bytes that a warp reads together lie in different banks: rows are an odd number of vectors
// apart, and those of `inner`, of which it reads eight pairs of channels by four pixels, a quarter or half of
// the banks.
template <typename T>
struct Slice {
    static constexpr int channels = kSliceBytes / static_cast<int>(sizeof(T));
    static constexpr int vector = kPerVector<T>;
    static constexpr int pitch = channels + vector;
    static constexpr int inner_pitch = sizeof(T) == 2 ? channels + 2 * vector : channels;
};

struct BlockTile {
    int images, rows, columns;  // of pixels out; more than one image only if it is whole
    int down, across;           // warps, by pixels and by channels out
    int input_pixels;           // that it reads at most, with the rim
    int width_in, width_out;    // channels of x, 0 without an expansion, and channels out: in sixteens

    __host__ __device__ int pixels() const { return down * kWarpRows; }
    __host__ __device__ int threads() const { return down * across * kWarp; }
};

// Where a part of shared memory begins, and how far behind it there is one for the next slice, in bytes: that
// one loads while the other is worked on. 0 if there is none.
struct Room {
    int begin, next;
};

struct BlockMemory {
    Room x;           // [pixels in, C]
    Room inner;       // [pixels in, slice]; without an expansion of x, for two slices
    Room convolved;   // [pixels out, slice]
    Room expansion;   // [C, slice], for two slices
    Room projection;  // [slice, channels out], for two slices
    Room taps;        // [9, slice], for two slices
    Room affine;      // [4, slice] in float, for two slices: scale and shift of both inner convolutions
    Room where;       // [pixels in], where a pixel lies
    Room place;       // which tile it is
    int bytes;
};

template <typename T>
BlockMemory block_memory(const BlockTile& tile) {
    using Part = Slice<T>;
    const bool expands = tile.width_in > 0;
    const int pixels = rounded_up(tile.input_pixels, kWarpRows);
    BlockMemory memory{};
    const auto room = [&](bool two, int elements, std::size_t size = sizeof(T)) {
        const int begin = memory.bytes, bytes = rounded_up(elements * static_cast<int>(size), kVectorBytes);
        memory.bytes += two ? 2 * bytes : bytes;
        return Room{begin, two ? bytes : 0};
    };
    if (expands) memory.x = room(false, pixels * (tile.width_in + Part::vector));
    memory.inner = room(!expands, pixels * Part::inner_pitch);
    memory.convolved = room(false, tile.pixels() * Part::pitch);
    if (expands) memory.expansion = room(true, tile.width_in * Part::pitch);
    memory.projection = room(true, Part::channels * (tile.width_out + Part::vector));
    memory.taps = room(true, 9 * Part::channels);
    memory.affine = room(true, 4 * Part::channels, sizeof(float));
    memory.where = room(false, pixels, sizeof(int));
    memory.place = room(false, kPlace, 1);
    return memory;
}

// What a tile follows from: nothing that a population or a batch could change.
struct BlockShape {
    int height, width, stride;  // of what the depthwise convolution reads, and its stride
    int max_in, max_out;        // channels of x, 0 without an expansion; channels out

    int out(int side) const { return (side - 1) / stride + 1; }
};

// Pixels in that a tile of `count` pixels out reads along a side, at most.
inline int pixels_in(int count, int out, int stride, int side) {
    if (count >= out) return side;
    const int first = (count - 1) * stride + 2, last = side - (ceil_div(out, count) - 1) * count * stride + 1;
    const int ends = first > last ? first : last;
    // Neither at an end of the image, a tile has a rim on both sides.
    return ceil_div(out, count) == 2 ? ends : first + 1 < side ? first + 1 : side;
}

// What a tile takes for one inner channel, in the time of one product of tensor cores.
template <typename T>
std::int64_t tile_cost(const BlockTile& tile) {
    // As sm_90 has them. Tensor cores make ten products in the time of one in float32; a pixel of the
    // depthwise convolution takes 18 instructions, and between the phases of a slice barriers and filling
    // pipelines take some hundred cycles. All weights come from the second-level cache, which gives a
    // multiprocessor a byte in the time of fifty products; they load meanwhile.
    constexpr std::int64_t kProduct = sizeof(T) == 4 ? 10 : 1, kConvolved = 180, kPhases = 4000, kByte = 50;
    const int runs = tile.images * tile.columns * ceil_div(tile.rows, kRun);
    const int products =
        rounded_up(tile.input_pixels, kWarpRows) * tile.width_in + tile.pixels() * tile.width_out;
    const int loaded = tile.width_out + 9 + (tile.width_in > 0 ? tile.width_in : tile.input_pixels);
    const std::int64_t computing = products * kProduct + runs * kRun * kConvolved + kPhases;
    const std::int64_t loading = loaded * static_cast<std::int64_t>(sizeof(T)) * kByte;
    return computing > loading ? computing : loading;
}

// The tile of least cost for these shapes, among even cuts of the image; one of no images if none fits.
template <typename T>
BlockTile choose_block_tile(const BlockShape& shape) {
    // Warps by pixels and by channels out: from 256 × 64 to 64 × 512 sums.
    constexpr int kWarps[][2] = {{8, 1}, {4, 2}, {2, 4}, {16, 1}, {8, 2}, {4, 4}, {2, 8}};
    const int out_height = shape.out(shape.height), out_width = shape.out(shape.width);
    BlockTile best{};
    double least = std::numeric_limits<double>::infinity();
    const auto consider = [&](const int (&warps)[2], int images, int rows, int columns) {
        const int most = warps[1] * kWarpColumns, width = rounded_up(shape.max_out, 16);
        BlockTile tile{images,
                       rows,
                       columns,
                       warps[0],
                       warps[1],
                       0,
                       rounded_up(shape.max_in, 16),
                       width < most ? width : most};
        if (images * rows * columns > tile.pixels()) return false;
        tile.input_pixels = images * pixels_in(rows, out_height, shape.stride, shape.height) *
                            pixels_in(columns, out_width, shape.stride, shape.width);
        const int bytes = block_memory<T>(tile).bytes;
        if (bytes > kSharedMost) return false;
        const int tiles = ceil_div(out_height, rows) * ceil_div(out_width, columns) *
                          ceil_div(shape.max_out, tile.width_out);
        // Alone on its multiprocessor, nothing is done while it waits at a barrier.
        const double alone = bytes > kSharedForTwo || tile.threads() > kMostThreads / 2 ? 1.25 : 1;
        const double cost = alone * tiles * static_cast<double>(tile_cost<T>(tile)) / images;
        if (cost < least) {
            least = cost;
            best = tile;
        }
        return true;
    };
    for (const auto& warps : kWarps) {
        for (int down = 1; down <= out_height; ++down) {
            const int rows = ceil_div(out_height, down);
            if (down > 1 && rows == ceil_div(out_height, down - 1)) continue;
            for (int across = 1; across <= out_width; ++across) {
                const int columns = ceil_div(out_width, across);
                if (across > 1 && columns == ceil_div(out_width, across - 1)) continue;
                consider(warps, 1, rows, columns);
            }
        }
        for (int images = 2; consider(warps, images, out_height, out_width); ++images) {
        }
    }
    return best;
}

}  // namespace metaprune::cuda
