// What a block of threads of fused_block works on: which tile it has, and the copies that bring it into
// shared memory.
//
// Legend: C channels of x; a slice is of inner channels.

#pragma once

#include <cstdint>

#include "block_tile.cuh"
#include "thread.cuh"

namespace metaprune::cuda {

// Which tile a block of threads has. It lies in shared memory: registers hold sums.
struct Place {
    int s, channels, inner, width;  // the subnetwork, and its channels: of x, between, out
    int first_panel, panels;        // of sixteen channels out each: this tile's
    int images, top, left;          // this tile's, and the first of its rows and columns of pixels out
    int in_top, in_left, in_rows, in_columns;  // what it reads of every image
    int first_image;
    std::int64_t input;  // where that begins in x

    __device__ int input_pixels() const { return images * in_rows * in_columns; }
};

static_assert(sizeof(Place) <= kPlace);

// A block of threads and its shared memory.
template <typename T, bool EXPANDS>
struct Block {
    const Chain<T>& chain;
    const BlockTile& tile;
    const BlockMemory& memory;
    unsigned char* shared;

    __device__ const Stage<T>& expansion() const { return chain.stage[0]; }
    __device__ const Stage<T>& depthwise() const { return chain.stage[EXPANDS ? 1 : 0]; }
    __device__ const Stage<T>& projection() const { return chain.stage[EXPANDS ? 2 : 1]; }
    __device__ int out_size(std::int64_t side) const {
        return (static_cast<int>(side) - 1) / static_cast<int>(depthwise().stride) + 1;
    }

    template <typename U>
    __device__ U* part(const Room& room, int slice = 0) const {
        return reinterpret_cast<U*>(shared + room.begin + slice % 2 * room.next);
    }
    __device__ const Place& place() const { return *part<Place>(memory.place); }
    __device__ int* where() const { return part<int>(memory.where); }
    __device__ T* x() const { return part<T>(memory.x); }
    __device__ T* inner(int slice) const { return part<T>(memory.inner, slice); }
    __device__ T* convolved() const { return part<T>(memory.convolved); }
    __device__ T* expansion_weights(int slice) const { return part<T>(memory.expansion, slice); }
    __device__ T* projection_weights(int slice) const { return part<T>(memory.projection, slice); }
    __device__ T* taps(int slice) const { return part<T>(memory.taps, slice); }
    __device__ float* affine(int slice) const { return part<float>(memory.affine, slice); }
};

// Begins to copy a vector of numbers of which `kept` are wanted; zeros for the others.
template <typename T>
__device__ __forceinline__ void copy_numbers(T* to, const T* from, int kept) {
    const int most = kPerVector<T>, wanted = kept < 0 ? 0 : kept > most ? most : kept;
    copy_async_part<kVectorBytes>(to, from, wanted * static_cast<int>(sizeof(T)));
}

// Which tile this block of threads has; one without panels if it has none.
template <typename T, bool EXPANDS>
__device__ Place located(const Block<T, EXPANDS>& block) {
    const Chain<T>& chain = block.chain;
    const BlockTile& tile = block.tile;
    const int stride = static_cast<int>(block.depthwise().stride);
    const auto clip = [](int value, int most) { return value < 0 ? 0 : value > most ? most : value; };
    Place place;
    place.s = static_cast<int>(blockIdx.y);
    place.channels = chain.channels[place.s];
    place.inner = block.depthwise().channels[place.s];
    place.width = block.projection().channels[place.s];
    const int most = tile.width_out / 16;
    place.first_panel = static_cast<int>(blockIdx.z) * most;
    place.panels = clip(ceil_div(place.width, 16) - place.first_panel, most);

    const int height = static_cast<int>(chain.H), width = static_cast<int>(chain.W);
    const int out_height = block.out_size(height), out_width = block.out_size(width);
    const int across = ceil_div(out_width, tile.columns), tiles = across * ceil_div(out_height, tile.rows);
    const int group = static_cast<int>(blockIdx.x) / tiles, number = static_cast<int>(blockIdx.x) % tiles;
    place.first_image = group * tile.images;
    place.images = clip(static_cast<int>(chain.N) - place.first_image, tile.images);
    place.top = number / across * tile.rows;
    place.left = number % across * tile.columns;

    const int bottom = clip(place.top + tile.rows, out_height),
              right = clip(place.left + tile.columns, out_width);
    place.in_top = clip(place.top * stride - 1, height);
    place.in_left = clip(place.left * stride - 1, width);
    place.in_rows = clip((bottom - 1) * stride + 2, height) - place.in_top;
    place.in_columns = clip((right - 1) * stride + 2, width) - place.in_left;
    const std::int64_t area = chain.H * chain.W;
    place.input =
        chain.source[place.s] * chain.N * area * rounded_up(static_cast<int>(chain.max_channels), 8) +
        place.first_image * area * rounded_up(place.channels, 8);
    return place;
}

// Where each pixel that the tile reads lies, in pixels from the tile's first image.
template <typename T, bool EXPANDS>
__device__ void find_pixels(const Block<T, EXPANDS>& block, const Place& place) {
    const int columns = place.in_columns, area = place.in_rows * columns;
    const int height = static_cast<int>(block.chain.H), width = static_cast<int>(block.chain.W);
    for (int p = thread_number(); p < place.input_pixels(); p += blockDim.x) {
        const int row = p % area / columns, column = p % area % columns;
        block.where()[p] = (p / area * height + place.in_top + row) * width + place.in_left + column;
    }
}

// Begins to copy `vectors` vectors of channels from `first` on, of every pixel that the tile reads; zeros
// beyond the last channel.
template <typename T, bool EXPANDS>
__device__ void load_pixels(const Block<T, EXPANDS>& block, T* to, int pitch, int first, int vectors) {
    constexpr int V = kPerVector<T>;
    const Place& place = block.place();
    const int channels = place.channels, stride = rounded_up(channels, 8),
              count = place.input_pixels() * vectors;
    const T* from = block.chain.x + place.input;
    for (int i = thread_number(); i < count; i += blockDim.x) {
        const int p = i / vectors, v = i % vectors * V, c = first + v;
        const T* pixel = from + static_cast<std::int64_t>(block.where()[p]) * stride;
        copy_numbers(to + p * pitch + v, pixel + (c < channels ? c : 0), channels - c);
    }
}

// Begins to copy `rows` rows of panels of weights, whose first `exist` exist; zeros for the others. Panels
// are `panel_size` numbers apart.
template <typename T>
__device__ void load_panels(T* to, int pitch, const T* from, int panels, int rows, int exist,
                            std::int64_t panel_size) {
    constexpr int V = kPerVector<T>, across = 16 / V;
    for (int i = thread_number(); i < panels * rows * across; i += blockDim.x) {
        const int v = i % across * V, row = i / across % rows, panel = i / across / rows;
        const bool exists = row < exist;
        copy_numbers(to + row * pitch + panel * 16 + v,
                     from + panel * panel_size + (exists ? row * 16 + v : 0), exists ? V : 0);
    }
}

// Begins to copy scale and shift of a slice; zeros beyond the last channel.
template <typename T>
__device__ void load_affine(float* to, const Stage<T>& stage, int s, int first, int inner) {
    constexpr int count = Slice<T>::channels;
    const std::int64_t row = s * stage.max_channels;
    for (int i = thread_number(); i < 2 * count; i += blockDim.x) {
        const int c = first + i % count;
        const float* from = (i < count ? stage.scale : stage.shift) + row;
        copy_async_part<sizeof(float)>(to + i, from + (c < inner ? c : 0),
                                       c < inner ? static_cast<int>(sizeof(float)) : 0);
    }
}

// Begins to copy what a slice needs.
template <typename T, bool EXPANDS>
__device__ void load_slice(const Block<T, EXPANDS>& block, int number) {
    using Part = Slice<T>;
    constexpr int V = Part::vector, vectors = Part::channels / V;
    const Place& place = block.place();
    const int first = number * Part::channels, s = place.s, inner = place.inner;
    if constexpr (EXPANDS) {
        const Stage<T>& stage = block.expansion();
        const int panels = ceil_div(inner - first, 16), most = Part::channels / 16;
        const std::int64_t panel_size = static_cast<std::int64_t>(place.channels) * 16;
        load_panels(block.expansion_weights(number), Part::pitch,
                    stage.weight + stage.weight_source[s] * stage.weight_slot + first / 16 * panel_size,
                    panels < most ? panels : most, rounded_up(place.channels, 16), place.channels,
                    panel_size);
        load_affine(block.affine(number), stage, s, first, inner);
    } else {
        load_pixels(block, block.inner(number), Part::inner_pitch, first, vectors);
    }
    const Stage<T>& depthwise = block.depthwise();
    const T* taps = depthwise.weight + depthwise.weight_source[s] * depthwise.weight_slot;
    const int stored = rounded_up(inner, 8);
    for (int i = thread_number(); i < 9 * vectors; i += blockDim.x) {
        const int tap = i / vectors, c = first + i % vectors * V;
        copy_numbers(block.taps(number) + i * V, taps + (c < stored ? tap * stored + c : 0),
                     c < stored ? V : 0);
    }
    load_affine(block.affine(number) + 2 * Part::channels, depthwise, s, first, inner);

    const Stage<T>& projection = block.projection();
    const std::int64_t panel_size = static_cast<std::int64_t>(inner) * 16;
    load_panels(block.projection_weights(number), block.tile.width_out + V,
                projection.weight + projection.weight_source[s] * projection.weight_slot +
                    place.first_panel * panel_size + first * 16,
                place.panels, Part::channels, inner - first, panel_size);
    commit_copies();
}

}  // namespace metaprune::cuda
