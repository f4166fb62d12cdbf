// Registers update_generators_ on the CPU. Schema and fake kernel are declared in kernels/ops.py.

#include "update_generators.h"

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace metaprune {
namespace {

Tensor update_generators_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                             const Tensor& bias_momentum, const Tensor& codes, const Tensor& grad,
                             const Tensor& cin, const Tensor& cout, bool depthwise, double lr,
                             double momentum, double weight_decay) {
    constexpr ScalarType dtype = ScalarType::Float;
    STD_TORCH_CHECK(basis.dim() == 4 && codes.dim() == 2, "basis must be [O, I, K, H] and codes [S, H]");
    const std::int64_t O = basis.size(0), I = basis.size(1), K = basis.size(2), H = basis.size(3),
                       S = codes.size(0);
    STD_TORCH_CHECK(S * O * I * K > 0, "basis and codes must not be empty, but for H");
    STD_TORCH_CHECK(!depthwise || I == 1, "a depthwise basis must be [C, 1, K, H]");
    expect("basis", basis, dtype, {O, I, K, H});
    expect("bias", bias, dtype, {O, I, K});
    expect("basis_momentum", basis_momentum, dtype, {O, I, K, H});
    expect("bias_momentum", bias_momentum, dtype, {O, I, K});
    expect("codes", codes, dtype, {S, H});
    const std::int64_t slot = depthwise ? K * round_up(O, 8) : round_up(O, kPanel) * K * I;
    expect("grad", grad, dtype, {S, slot});

    UpdateGenerators args{};
    args.O = O;
    args.I = depthwise ? K : I;
    args.K = depthwise ? 1 : K;
    args.H = H;
    args.F = S;
    args.basis = mutable_data<float>(basis);
    args.bias = mutable_data<float>(bias);
    args.basis_momentum = mutable_data<float>(basis_momentum);
    args.bias_momentum = mutable_data<float>(bias_momentum);

    const std::int32_t *widths = expect_widths("cout", cout, S, O),
                       *inputs = depthwise ? nullptr : expect_widths("cin", cin, S, I);
    std::vector<Crop> crops;
    for (std::int64_t s = 0; s < S; ++s) {
        const float* front = data<float>(grad) + s * slot;
        crops.push_back(packed_crop(front, depthwise ? K : inputs[s], widths[s], args.K, depthwise));
    }
    args.crops = crops.data();

    const auto* code = data<float>(codes);
    const std::vector<float> to_weights(S, static_cast<float>(-lr)), to_momentum(S, 1.0f);
    std::vector<float> weights_codes(code, code + S * H);
    for (float& number : weights_codes) number *= to_weights[0];
    args.weights = {static_cast<float>(-lr * weight_decay), static_cast<float>(-lr * momentum),
                    to_weights.data(), weights_codes.data()};
    args.momentum = {static_cast<float>(weight_decay), static_cast<float>(momentum), to_momentum.data(),
                     code};

    std::vector<double> partial(kUpdateBlocks * S * H);
    const Isa isa = chosen_isa();
    // Blocks a thread should take at least: about a million numbers.
    const std::int64_t grain = 1 + 1000000 * kUpdateBlocks / (O * I * K * (H + 1));
    torch::stable::parallel_for(0, kUpdateBlocks, grain, [&](std::int64_t begin, std::int64_t end) {
        update_generators(isa, args, partial.data(), begin, end);
    });

    const Tensor d_codes = torch::stable::empty_like(codes);
    auto* total = mutable_data<float>(d_codes);
    for (std::int64_t n = 0; n < S * H; ++n) {
        double sum = 0;
        for (std::int64_t block = 0; block < kUpdateBlocks; ++block) sum += partial[block * S * H + n];
        total[n] = static_cast<float>(sum);
    }
    return d_codes;
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("update_generators_", TORCH_BOX(&metaprune::update_generators_cpu));
}
