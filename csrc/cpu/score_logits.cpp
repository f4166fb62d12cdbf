#include "score_logits.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "workspace.h"

namespace metaprune {
namespace {

// Memory of a group of images; logits [classes, images] = weight [classes, channels] · features.
struct Product {
    std::int64_t panels;      // of 16 images
    float* rows;              // means of the images of a panel [16, row_stride]
    std::int64_t row_stride;  // a multiple of 16
    float* features;          // [panels, row_stride, 16]
    std::int64_t panel_stride;
    float* staged;  // rows of the classifier at hand [kMostRows, kMostChannels]
    float* logits;  // [classes, logit_stride]
    std::int64_t logit_stride;
};

// The largest tile of the classifier, whatever the instruction set.
constexpr std::int64_t kMostRows = 8, kMostChannels = 128;

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "score_logits.inc"
#include "for_each_isa.h"

namespace metaprune {
namespace {

template <typename T, typename W>
void compute_logits(Isa isa, const ScoreLogits<T, W>& args, std::int64_t s, std::int64_t first,
                    std::int64_t images, const Product& product) {
    METAPRUNE_CALL(isa, compute_logits(args, s, first, images, product));
}

struct Score {
    bool correct;
    double loss;
};

// Of logits that are `stride` apart. The first of equal ones wins, as in torch.argmax; a NaN makes the loss
// NaN.
Score score(const float* logits, std::int64_t stride, const float* bias, std::int64_t classes,
            std::int64_t label) {
    const auto logit = [&](std::int64_t t) { return logits[t * stride] + bias[t]; };
    std::int64_t best = 0;
    bool has_nan = false;
    for (std::int64_t t = 0; t < classes; ++t) {
        if (logit(t) > logit(best)) best = t;
        has_nan = has_nan || std::isnan(logit(t));
    }
    const double largest = logit(best);
    double sum = 0;
    for (std::int64_t t = 0; t < classes; ++t) sum += std::exp(static_cast<double>(logit(t)) - largest);
    return {best == label && !has_nan, std::log(sum) + largest - static_cast<double>(logit(label))};
}

}  // namespace

template <typename T, typename W>
void score_logits(Isa isa, const ScoreLogits<T, W>& args, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kGroup = ScoreLogits<T, W>::kGroup;
    // Rows a panel apart from a power of two, so that those of a panel do not share their places in the
    // cache.
    const std::int64_t row = round_up(args.max_channels, kPanel) + kPanel;
    const std::int64_t rows = kPanel * row, features = kGroup * row, staged = kMostRows * kMostChannels;
    const std::int64_t floats = rows + features + staged + args.classes * kGroup;
    auto* memory = reinterpret_cast<float*>(workspace(static_cast<std::size_t>(floats) * sizeof(float)));
    Product product{0,
                    memory,
                    row,
                    memory + rows,
                    kPanel * row,
                    memory + rows + features,
                    memory + rows + features + staged,
                    kGroup};
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t s = item / args.groups(), first = item % args.groups() * kGroup;
        const std::int64_t images = std::min(kGroup, args.N - first);
        product.panels = round_up(images, kPanel) / kPanel;
        compute_logits(isa, args, s, first, images, product);
        for (std::int64_t n = 0; n < images; ++n) {
            const Score result =
                score(product.logits + n, kGroup, args.bias, args.classes, args.labels[first + n]);
            args.correct[s * args.N + first + n] = result.correct;
            args.loss[s * args.N + first + n] = result.loss;
        }
    }
}

#define INSTANTIATE(T, W) \
    template void score_logits(Isa, const ScoreLogits<T, W>&, std::int64_t, std::int64_t);
INSTANTIATE(float, float)
INSTANTIATE(BFloat16, float)
INSTANTIATE(BFloat16, BFloat16)

}  // namespace metaprune
