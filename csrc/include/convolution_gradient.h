// The gradient of a bare dense convolution over raw pointers: ragged_conv_backward. The maths is in
// kernels/ragged_conv/README.md, the layouts in kernels/layout.py.
//
// Legend: S subnetworks, N images, O channels out, I channels in, K = kernel² taps, H W size.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "isa.h"
#include "storage.h"

namespace metaprune {

// Work is cut by the shapes alone, because sums are added part by part. What one item does:
// - with gradients of x, of all readers of slot l in the group of images, and
// - of the weights of `channels` input channels in a group of images: of all readers of slot l if the
//   weights are small (`together`), else one subnetwork and one range of channels at a time.
struct GradientCut {
    bool together;
    std::int64_t input_group, weight_group;  // images
    std::int64_t channels;                   // of a range of input channels
};

// Taps [begin, end) along one axis: those that meet the image anywhere, where it is smaller than the kernel.
struct TapSpan {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
};

template <typename T>
struct ConvolutionGradient {
    std::int64_t S, N, H, W, out_H, out_W;
    std::int64_t kernel, stride;
    std::int64_t max_cin, max_cout;
    std::int64_t slots;                 // of x
    const std::int32_t* cin;            // [S], equal where `source` is
    const std::int32_t* cout;           // [S]
    const std::int32_t* source;         // [S], slots of x
    const std::int32_t* weight_source;  // [S], slots of weight, in which cin and cout are equal
    const T* x;                         // slots of activations
    const T* y;                         // S slots, the output of the convolution
    const T* grad_y;                    // S slots, or null: zero
    const double* grad_sums;            // [S, 2, max_cout], or null: zero
    const T* weight;                    // slots of `weight_slot()` elements
    const float* input_scale;           // [slots, max_cin], or null: x is taken as it is
    const float* input_shift;           // likewise
    Clamp input_clamp;
    GradientCut cut;
    void* turned;                 // slots of weight of `turned_slot()` numbers: see turn_weights
    float* parts;                 // [groups(weight_group)] of every subnetwork, from part_of[s] on
    const std::int64_t* part_of;  // [S]
    double* sums;    // [slots, groups(input_group), 2, max_cin]: gradients of shift and scale, or null
    T* grad_x;       // slots like those of x, or null
    bool streams;    // it is written past the caches
    T* grad_weight;  // slots like those of weight

    std::int64_t taps() const { return kernel * kernel; }
    TapSpan span(std::int64_t size, std::int64_t out_size) const {
        const std::int64_t pad = kernel / 2, begin = pad - (out_size - 1) * stride, end = pad + size;
        return {begin < 0 ? 0 : begin, end < kernel ? end : kernel};
    }
    TapSpan rows() const { return span(H, out_H); }
    TapSpan columns() const { return span(W, out_W); }
    // Taps whose weights are used at all.
    std::int64_t used() const { return rows().size() * columns().size(); }
    std::int64_t groups(std::int64_t images) const { return (N + images - 1) / images; }
    std::int64_t ranges(std::int64_t s) const { return (cin[s] + cut.channels - 1) / cut.channels; }
    std::int64_t weight_slot() const {
        return round_up(max_cout, kPanel) * taps() * round_up(max_cin, kPerWord<T>);
    }
    std::int64_t turned_slot() const {
        return round_up(max_cin, kPanel) * used() * round_up(max_cout, kPerWord<T>);
    }
    // Floats of one part of the gradient of the weights of subnetwork s: ranges of input channels, of each
    // rows [used taps, channels] of round_up(cout, 16).
    std::int64_t part(std::int64_t s) const {
        return round_up(cout[s], kPanel) * used() * round_up(cin[s], kPerWord<T>);
    }
};

// What an item of work covers: images [begin, end) of slot `slot` of x.
struct GradientItem {
    std::int64_t slot, subnetwork;  // all readers of the slot, or one of them; -1: all
    std::int64_t begin, end;
    std::int64_t first, last;  // input channels whose weights get their gradient, none if equal
    std::int64_t part;         // group of images among the parts of that gradient
    bool input;                // whether x gets its gradient
    std::int64_t sums;         // group of images among the sums
};

template <typename T>
GradientCut cut_gradient(const ConvolutionGradient<T>& args);

// Panel `panel` (of sixteen input channels) of one slot of weight, as `subnetwork` reads it, turned round for
// the product with the gradient of y: for each of stride² parities of pixels of x and its used taps, in
// reverse, rows of one word of outputs and sixteen input channels.
template <typename T>
void turn_weights(Isa isa, const ConvolutionGradient<T>& args, std::int64_t slot, std::int64_t subnetwork,
                  std::int64_t panel);

template <typename T>
void run_gradient(Isa isa, const ConvolutionGradient<T>& args, const GradientItem& item);

// Adds up the parts of the gradient of one slot of weight for sixteen input channels, and writes it.
template <typename T>
void add_parts(Isa isa, const ConvolutionGradient<T>& args, std::int64_t slot, std::int64_t subnetwork,
               std::int64_t panel);

}  // namespace metaprune
