// Registers update_generators_ on the CPU. Schema and fake kernel are declared in kernels/ops.py.

#include "update_generators.h"

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace metaprune {
namespace {

Tensor update_generators_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                             const Tensor& bias_momentum, const Tensor& codes,
                             const std::vector<Tensor>& grads, double lr, double momentum,
                             double weight_decay) {
    constexpr ScalarType dtype = ScalarType::Float;
    STD_TORCH_CHECK(basis.dim() == 4, "basis must be [O, I, K, H]");
    const std::int64_t O = basis.size(0), I = basis.size(1), K = basis.size(2), H = basis.size(3);
    const auto S = static_cast<std::int64_t>(grads.size());
    STD_TORCH_CHECK(S * O * I * K * H > 0, "basis and grads must not be empty");
    expect("basis", basis, dtype, {O, I, K, H});
    expect("bias", bias, dtype, {O, I, K});
    expect("basis_momentum", basis_momentum, dtype, {O, I, K, H});
    expect("bias_momentum", bias_momentum, dtype, {O, I, K});
    expect("codes", codes, dtype, {S, H});

    std::vector<const float*> pointers;
    std::vector<std::int64_t> couts, lengths;
    for (const Tensor& grad : grads) {
        STD_TORCH_CHECK(grad.dim() == 3, "grads must be [O_s, I_s, K] each");
        const std::int64_t cout = grad.size(0), cin = grad.size(1);
        expect("grads", grad, dtype, {cout, cin, K});
        STD_TORCH_CHECK(cout >= 1 && cout <= O && cin >= 1 && cin <= I, "grads has a crop of ", cout, " × ",
                        cin, " channels; legal are 1..", O, " × 1..", I);
        pointers.push_back(data<float>(grad));
        couts.push_back(cout);
        lengths.push_back(cin * K);
    }

    UpdateGenerators args{};
    args.S = S;
    args.rows = O * I * K;
    args.H = H;
    args.row_length = I * K;
    args.basis = mutable_data<float>(basis);
    args.bias = mutable_data<float>(bias);
    args.basis_momentum = mutable_data<float>(basis_momentum);
    args.bias_momentum = mutable_data<float>(bias_momentum);
    args.codes = data<float>(codes);
    args.grads = pointers.data();
    args.cout = couts.data();
    args.length = lengths.data();
    args.lr = static_cast<float>(lr);
    args.momentum = static_cast<float>(momentum);
    args.weight_decay = static_cast<float>(weight_decay);

    std::vector<double> partial(kUpdateBlocks * S * H);
    const Isa isa = chosen_isa();
    // Blocks a thread should take at least: about a million numbers.
    const std::int64_t grain = 1 + 1000000 * kUpdateBlocks / (args.rows * H);
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
