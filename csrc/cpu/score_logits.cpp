#include "score_logits.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "workspace.h"

namespace metaprune {
namespace {

// logits [images, classes rounded up] = features [images, channels] · panels.
struct Product {
    std::int64_t images, channels;
    float* features;
    std::int64_t feature_stride;  // a multiple of 16
    const float* panels;          // [logit_stride / 16, panel_stride]
    std::int64_t panel_stride;
    float* logits;
    std::int64_t logit_stride;  // a multiple of 16
};

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "score_logits.inc"
#include "for_each_isa.h"

namespace metaprune {
namespace {

template <typename T>
void compute_logits(Isa isa, const ScoreLogits<T>& args, std::int64_t s, std::int64_t first,
                    const Product& product) {
    METAPRUNE_CALL(isa, compute_logits(args, s, first, product));
}

struct Score {
    bool correct;
    double loss;
};

// The first of equal logits wins, as in torch.argmax; a NaN makes the loss NaN.
Score score(const float* logits, const float* bias, std::int64_t classes, std::int64_t label) {
    std::int64_t best = 0;
    bool has_nan = false;
    for (std::int64_t t = 0; t < classes; ++t) {
        const float logit = logits[t] + bias[t];
        if (logit > logits[best] + bias[best]) best = t;
        has_nan = has_nan || std::isnan(logit);
    }
    const double largest = logits[best] + bias[best];
    double sum = 0;
    for (std::int64_t t = 0; t < classes; ++t)
        sum += std::exp(static_cast<double>(logits[t] + bias[t]) - largest);
    return {best == label && !has_nan,
            std::log(sum) + largest - static_cast<double>(logits[label] + bias[label])};
}

}  // namespace

template <typename T>
void pack_classifier(Isa isa, const T* weight, std::int64_t classes, std::int64_t channels, float* panels,
                     std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL(isa, pack_classifier(weight, classes, channels, panels, begin, end));
}

template <typename T>
void score_logits(Isa isa, const ScoreLogits<T>& args, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kGroup = ScoreLogits<T>::kGroup;
    // Rows a panel apart from a power of two, so that those of a tile do not share their places in the cache.
    const std::int64_t features = round_up(args.max_channels, kPanel) + kPanel;
    const std::int64_t logits = round_up(args.classes, kPanel);
    auto* memory = reinterpret_cast<float*>(workspace(kGroup * (features + logits) * sizeof(float)));
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t s = item / args.groups(), first = item % args.groups() * kGroup;
        const Product product{
            std::min(kGroup, args.N - first), args.channels[s],           memory, features, args.panels,
            args.max_channels * kPanel,       memory + kGroup * features, logits};
        compute_logits(isa, args, s, first, product);
        for (std::int64_t n = 0; n < product.images; ++n) {
            const Score result =
                score(product.logits + n * logits, args.bias, args.classes, args.labels[first + n]);
            args.correct[s * args.N + first + n] = result.correct;
            args.loss[s * args.N + first + n] = result.loss;
        }
    }
}

#define INSTANTIATE(T)                                                                             \
    template void pack_classifier(Isa, const T*, std::int64_t, std::int64_t, float*, std::int64_t, \
                                  std::int64_t);                                                   \
    template void score_logits(Isa, const ScoreLogits<T>&, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
