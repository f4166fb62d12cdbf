// Registers score_logits on the CPU. Schema and fake kernel are declared in kernels/ops.py.

#include "score_logits.h"

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "items.h"

namespace metaprune {
namespace {

const std::int64_t* expect_labels(const Tensor& labels, std::int64_t N, std::int64_t classes) {
    expect("labels", labels, ScalarType::Long, {N});
    const auto* values = labels.const_data_ptr<std::int64_t>();
    for (std::int64_t n = 0; n < N; ++n) {
        STD_TORCH_CHECK(values[n] >= 0 && values[n] < classes, "labels[", n, "] is ", values[n],
                        "; legal values are 0..", classes - 1);
    }
    return values;
}

template <typename T, typename W>
std::tuple<Tensor, Tensor> score(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 const Tensor& labels, const Tensor& channels, const Tensor& source,
                                 const std::vector<std::int64_t>& image) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1, "weight must be [classes, max channels]");
    const ScalarType dtype = x.scalar_type();
    const std::int64_t S = expect_count("channels", channels);
    ScoreLogits<T, W> args{};
    args.S = S;
    args.classes = weight.size(0);
    args.max_channels = weight.size(1);
    const std::int64_t slot = expect_slot(image, args.max_channels);
    args.N = image[0];
    args.pixels = image[1] * image[2];
    expect("weight", weight, std::is_same_v<W, float> ? ScalarType::Float : dtype,
           {args.classes, args.max_channels});
    const Tensor biases = expect_floats("bias", bias, dtype, {args.classes});
    args.source = expect_slots("source", source, S, expect_buffer("x", x, dtype, slot));
    args.channels = expect_widths("channels", channels, S, args.max_channels);
    args.labels = expect_labels(labels, args.N, args.classes);

    const Isa isa = chosen_isa();
    const Tensor correct = torch::stable::new_empty(x, {S, args.N}, ScalarType::Bool);
    const Tensor loss = torch::stable::new_empty(x, {S, args.N}, ScalarType::Double);
    args.x = data<T>(x);
    args.weight = data<W>(weight);
    args.bias = data<float>(biases);
    args.correct = mutable_data<bool>(correct);
    args.loss = mutable_data<double>(loss);
    for_each_item(S * args.groups(),
                  [&](std::int64_t begin, std::int64_t end) { score_logits(isa, args, begin, end); });
    return std::tuple(correct, loss);
}

std::tuple<Tensor, Tensor> score_logits_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                            const Tensor& labels, const Tensor& channels,
                                            const Tensor& source, const std::vector<std::int64_t>& image) {
    return with_storage_type("score_logits", x, [&](auto storage) {
        using T = decltype(storage);
        const auto run = weight.scalar_type() == ScalarType::Float ? score<T, float> : score<T, T>;
        return run(x, weight, bias, labels, channels, source, image);
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("score_logits", TORCH_BOX(&metaprune::score_logits_cpu));
}
