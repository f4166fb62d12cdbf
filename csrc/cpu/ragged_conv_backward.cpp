#include <algorithm>
#include <cstddef>

#include "convolution_gradient.h"
#include "workspace.h"

#if defined(METAPRUNE_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

#define METAPRUNE_BODY "ragged_conv_backward.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
GradientCut cut_gradient(const ConvolutionGradient<T>& args) {
    constexpr std::int64_t kTogether = 448 << 10;  // floats of weights whose gradient stays in cache
    constexpr std::int64_t kRange = 192 << 10;     // floats of a range of channels of larger ones
    constexpr std::int64_t kParts = 4 << 20;       // floats of all parts of one gradient of weights
    // For each subnetwork: how many there are may change nothing in the result of one.
    constexpr std::int64_t kItems = 32, kPixels = 512, kInputPixels = 196;
    const std::int64_t pixels = args.out_H * args.out_W;
    const std::int64_t weights = round_up(args.max_cout, kPanel) * args.used() * args.max_cin;
    const auto images = [&](std::int64_t groups, std::int64_t least) {
        const std::int64_t most = std::max<std::int64_t>(args.N * pixels / least, 1);
        groups = std::clamp<std::int64_t>(groups, 1, std::min(most, args.N));
        return (args.N + groups - 1) / groups;
    };
    const std::int64_t fit = kParts / weights;
    GradientCut cut{};
    cut.together = weights <= kTogether;
    cut.channels = args.max_cin;
    if (cut.together) {
        cut.input_group = cut.weight_group = images(std::min(kItems, fit), kPixels);
        return cut;
    }
    const std::int64_t channels = kRange / (round_up(args.max_cout, kPanel) * args.used());
    cut.channels = std::min(std::max(channels / kPanel * kPanel, kPanel), args.max_cin);
    const std::int64_t ranges = (args.max_cin + cut.channels - 1) / cut.channels;
    cut.channels = std::min(round_up((args.max_cin + ranges - 1) / ranges, kPanel), args.max_cin);
    cut.weight_group = images(std::min(kItems / ranges, fit), kPixels);
    cut.input_group = images(2 * kItems, kInputPixels);
    return cut;
}

template GradientCut cut_gradient(const ConvolutionGradient<float>&);
template GradientCut cut_gradient(const ConvolutionGradient<BFloat16>&);

#define INSTANTIATE(T, CALL, TILES)                                                                   \
    template <>                                                                                       \
    void turn_weights(Isa isa, const ConvolutionGradient<T>& args, std::int64_t slot, std::int64_t s, \
                      std::int64_t panel) {                                                           \
        CALL(isa, turn_weights(args, slot, s, panel));                                                \
    }                                                                                                 \
    template <>                                                                                       \
    void run_gradient(Isa isa, const ConvolutionGradient<T>& args, const GradientItem& item) {        \
        CALL(isa, run_gradient(args, TILES, item));                                                   \
    }                                                                                                 \
    template <>                                                                                       \
    void add_parts(Isa isa, const ConvolutionGradient<T>& args, std::int64_t slot, std::int64_t s,    \
                   std::int64_t panel) {                                                              \
        CALL(isa, add_parts(args, slot, s, panel));                                                   \
    }
INSTANTIATE(float, METAPRUNE_CALL_FLOAT, false)
INSTANTIATE(BFloat16, METAPRUNE_CALL, isa == Isa::amx)

}  // namespace metaprune
