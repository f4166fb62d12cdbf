// The depthwise-separable block and the inverted residual in one kernel: [1×1,] depthwise 3×3, 1×1.
//
// A block of threads takes a tile of output pixels of one subnetwork. The inner channels go by in slices:
//
//     expansion   [pixels in with the halo, C] · [C, slice]   tensor cores, to shared memory
//     depthwise   pairs of channels, runs of pixels           registers, to shared memory
//     projection  [pixels out, slice] · [slice, O]            tensor cores, to registers
//
// while the weights of the next slice load, and without an expansion its pixels of x. What lies between the
// convolutions never leaves the chip; it is rounded to the dtype of x. Every sum has one order, whatever the
// tile. Proven under emulation and by compilation; not run on a GPU.
//
// Legend: S subnetworks, C channels of x, O channels out; a slice is of inner channels.

#pragma once

#include <cstdint>

#include "block_loads.cuh"
#include "matrix.cuh"
#include "thread.cuh"

namespace metaprune::cuda {

// inner = act(x · weights · scale + shift) of every pixel that the tile reads, for one slice.
template <typename T, bool EXPANDS>
__device__ void expand(const Block<T, EXPANDS>& block, int number) {
    using Part = Slice<T>;
    const Place& place = block.place();
    const int pitch = block.tile.width_in + Part::vector, depth = rounded_up(place.channels, 16);
    const int left = place.inner - number * Part::channels, pixels = place.input_pixels();
    const int warp = thread_number() / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    const float *scale = block.affine(number), *shift = scale + Part::channels;
    const Clamp clamp = block.expansion().clamp;
    constexpr int units = Part::channels / 16;
    // A warp takes 32 pixels by 16 channels at a time: it has other sums to keep.
    for (int item = warp; item < ceil_div(pixels, kWarpRows) * units; item += warps) {
        const int row = item / units * kWarpRows, column = item % units * 16;
        Accumulators<1> sum{};
        multiply_units<1>(sum, block.x() + row * pitch, pitch, block.expansion_weights(number) + column,
                          Part::pitch, depth, 0);
        T* to = block.inner(number) + (row + thread_number() % kWarp / 4) * Part::inner_pitch + column;
        for_each_pair(sum, [&](int r, int n, float first, float second) {
            // Beyond the last channel there are zeros, even where x is infinite.
            const int c = column + n;
            store_pair(to + r * 8 * Part::inner_pitch + n,
                       c < left ? clamped(first * scale[c] + shift[c], clamp) : 0.0f,
                       c + 1 < left ? clamped(second * scale[c + 1] + shift[c + 1], clamp) : 0.0f);
        });
    }
}

// convolved = act(depthwise 3×3 of inner · scale + shift), for one slice: a thread takes a pair of channels,
// and runs of pixels down the columns.
template <int STRIDE, typename T, bool EXPANDS>
__device__ void convolve(const Block<T, EXPANDS>& block, int number) {
    using Part = Slice<T>;
    constexpr int groups = Part::channels / 16;  // of eight pairs, of which a warp takes one for four columns
    const BlockTile& tile = block.tile;
    const Place& place = block.place();
    const int lane = thread_number() % kWarp, warp = thread_number() / kWarp;
    const int c = (lane % 8 + warp % groups * 8) * 2,
              workers = static_cast<int>(blockDim.x) / kWarp / groups * 4;
    const int columns = place.images * tile.columns, in_rows = place.in_rows, in_columns = place.in_columns;
    const int left = place.inner - number * Part::channels - c;
    const Clamp clamp = block.depthwise().clamp;

    float2 weight[9];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load_pair(block.taps(number) + tap * Part::channels + c);
    const T* inner = block.inner(number) + c;
    for (int item = warp / groups * 4 + lane / 8; item < columns * ceil_div(tile.rows, kRun);
         item += workers) {
        const int image = item % columns / tile.columns, column = item % columns % tile.columns;
        const int run = item / columns * kRun;
        // Of the first window, in what the tile reads.
        const int y = (place.top + run) * STRIDE - 1 - place.in_top;
        const int x = (place.left + column) * STRIDE - 1 - place.in_left;
        const T* first = inner + ((image * in_rows + y) * in_columns + x) * Part::inner_pitch;
        float2 sum[kRun]{};
#pragma unroll
        for (int i = 0; i < (kRun - 1) * STRIDE + 3; ++i) {
            const bool in_row = static_cast<unsigned>(y + i) < static_cast<unsigned>(in_rows);
            const T* row = first + i * in_columns * Part::inner_pitch;
#pragma unroll
            for (int j = 0; j < 3; ++j) {
                const bool inside =
                    in_row && static_cast<unsigned>(x + j) < static_cast<unsigned>(in_columns);
                const float2 value = inside ? load_pair(row + j * Part::inner_pitch) : float2{};
#pragma unroll
                for (int r = 0; r < kRun; ++r) {
                    const int tap = (i - r * STRIDE) * 3 + j;
                    if (tap < 0 || tap >= 9) continue;
                    sum[r].x += value.x * weight[tap].x;
                    sum[r].y += value.y * weight[tap].y;
                }
            }
        }
        const float* affine = block.affine(number) + 2 * Part::channels + c;
        const float2 scale = load_pair(affine), shift = load_pair(affine + Part::channels);
        T* to = block.convolved() + ((image * tile.rows + run) * tile.columns + column) * Part::pitch + c;
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
            if (run + r >= tile.rows) break;
            store_pair(to + r * tile.columns * Part::pitch,
                       left > 0 ? clamped(sum[r].x * scale.x + shift.x, clamp) : 0.0f,
                       left > 1 ? clamped(sum[r].y * scale.y + shift.y, clamp) : 0.0f);
        }
    }
}

// A warp's part of the projection's sums: pixels from `row` on, and every so many sixteens of channels from
// `unit` on, so that narrow subnetworks keep all warps at work.
struct Share {
    int row, unit;

    __device__ explicit Share(const BlockTile& tile) {
        const int warp = thread_number() / kWarp;
        row = warp % tile.down * kWarpRows;
        unit = warp / tile.down;
    }
};
using Sums = Accumulators<kWarpColumns / 16>;

// sum += convolved · weights, for one slice.
template <typename T, bool EXPANDS>
__device__ void project(const Block<T, EXPANDS>& block, Sums& sum, int number) {
    using Part = Slice<T>;
    const BlockTile& tile = block.tile;
    const Share share(tile);
    multiply<kWarpColumns / 16>(sum, block.convolved() + share.row * Part::pitch, Part::pitch,
                                block.projection_weights(number) + share.unit * 16,
                                tile.width_out + Part::vector, Part::channels,
                                ceil_div(block.place().panels - share.unit, tile.across), tile.across * 16);
}

// y = act(sum · scale + shift + shortcut), for a warp's part of the tile.
template <typename T, bool EXPANDS>
__device__ void store(const Block<T, EXPANDS>& block, const Sums& sum) {
    const Chain<T>& chain = block.chain;
    const BlockTile& tile = block.tile;
    const Place& place = block.place();
    const Stage<T>& stage = block.projection();
    const int height = block.out_size(chain.H), width = block.out_size(chain.W);
    const int stride = rounded_up(place.width, 8), area = tile.rows * tile.columns;
    const std::int64_t slot = chain.N * height * width * rounded_up(static_cast<int>(stage.max_channels), 8);
    const float *scale = stage.scale + place.s * stage.max_channels,
                *shift = stage.shift + place.s * stage.max_channels;
    const T* shortcut =
        chain.shortcut == nullptr ? nullptr : chain.shortcut + chain.shortcut_source[place.s] * slot;
    T* y = chain.y + place.s * slot;
    const Share share(tile);
    // Where this lane's four pixels begin; -1 outside of the image.
    std::int64_t begin[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int pixel = share.row + i * 8 + thread_number() % kWarp / 4;
        const int image = pixel / area, row = place.top + pixel % area / tile.columns;
        const int column = place.left + pixel % area % tile.columns;
        const bool exists = image < place.images && row < height && column < width;
        begin[i] = exists
                       ? ((std::int64_t{place.first_image + image} * height + row) * width + column) * stride
                       : -1;
    }
    for_each_pair(sum, [&](int r, int n, float first, float second) {
        const int o = (place.first_panel + share.unit + n / 16 * tile.across) * 16 + n % 16;
        if (begin[r] < 0 || o >= place.width) return;
        const std::int64_t at = begin[r] + o;
        const bool both = o + 1 < place.width;
        first = first * scale[o] + shift[o];
        second = both ? second * scale[o + 1] + shift[o + 1] : 0.0f;
        if (shortcut != nullptr) {
            const float2 added = load_pair(shortcut + at);
            first += added.x;
            second += both ? added.y : 0.0f;
        }
        store_pair(y + at, clamped(first, stage.clamp), clamped(second, stage.clamp));
    });
}

// Everything a block of threads does.
template <typename T, bool EXPANDS>
__device__ void compute_tile(const Chain<T>& chain, const BlockTile& tile, const BlockMemory& memory,
                             unsigned char* shared) {
    const Block<T, EXPANDS> block{chain, tile, memory, shared};
    {
        const Place place = located(block);
        if (place.panels <= 0) return;
        find_pixels(block, place);
        if (threadIdx.x == 0) *block.template part<Place>(memory.place) = place;
    }
    __syncthreads();
    if constexpr (EXPANDS) {
        constexpr int V = kPerVector<T>;
        load_pixels(block, block.x(), tile.width_in + V, 0, rounded_up(block.place().channels, 16) / V);
    }
    const auto exists = [&](int number) { return number * Slice<T>::channels < block.place().inner; };
    Sums sum{};
    for (int number = -1; exists(number); ++number) {
        wait_for_copies<0>();
        __syncthreads();
        if (exists(number + 1)) load_slice(block, number + 1);
        if (number < 0) continue;
        if constexpr (EXPANDS) {
            expand(block, number);
            __syncthreads();
        }
        if (block.depthwise().stride == 1) {
            convolve<1>(block, number);
        } else {
            convolve<2>(block, number);
        }
        __syncthreads();
        project(block, sum, number);
    }
    store(block, sum);
}

}  // namespace metaprune::cuda
