// Registers the ops that train weight generators on the CPU. Schemas and fake kernels are declared in
// kernels/ops.py.

#include "update_generators.h"

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "buffers.h"

namespace metaprune {
namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

constexpr ScalarType kDtype = ScalarType::Float;

Generator expect_generator(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                           const Tensor& bias_momentum, bool depthwise) {
    STD_TORCH_CHECK(basis.dim() == 4, "basis must be [O, I, K, H]");
    const std::int64_t O = basis.size(0), I = basis.size(1), K = basis.size(2), H = basis.size(3);
    STD_TORCH_CHECK(O * I * K > 0, "basis must not be empty, but for H");
    STD_TORCH_CHECK(!depthwise || I == 1, "a depthwise basis must be [C, 1, K, H]");
    expect("basis", basis, kDtype, {O, I, K, H});
    expect("bias", bias, kDtype, {O, I, K});
    const bool half_momentum = basis_momentum.scalar_type() == ScalarType::BFloat16;
    expect("basis_momentum", basis_momentum, half_momentum ? ScalarType::BFloat16 : kDtype, {O, I, K, H});
    expect("bias_momentum", bias_momentum, kDtype, {O, I, K});
    return {O,
            depthwise ? K : I,
            depthwise ? 1 : K,
            H,
            mutable_data<float>(basis),
            basis_momentum.mutable_data_ptr(),
            mutable_data<float>(bias),
            mutable_data<float>(bias_momentum),
            half_momentum};
}

std::int64_t slot_of(const Generator& g, bool depthwise) {
    return depthwise ? g.I * round_up(g.O, 8) : round_up(g.O, kPanel) * g.K * g.I;
}

std::vector<Crop> expect_crops(const Generator& g, const Tensor& cin, const Tensor& cout, std::int64_t S,
                               bool depthwise) {
    const std::int32_t *outputs = expect_widths("cout", cout, S, g.O),
                       *inputs = depthwise ? nullptr : expect_widths("cin", cin, S, g.I);
    std::vector<Crop> crops;
    for (std::int64_t s = 0; s < S; ++s)
        crops.push_back(packed_crop(depthwise ? g.I : inputs[s], outputs[s], g.K, depthwise));
    return crops;
}

// The factors of all steps one after another, and where the code and the number of each are.
struct Factors {
    std::vector<Factor> factors;
    std::vector<const float*> codes;
    std::vector<std::size_t> steps;

    void append(const Generator& g, const Tensor& grad, const Tensor& cin, const Tensor& cout, std::int64_t S,
                bool depthwise) {
        STD_TORCH_CHECK(grad.dim() == 2, "grad must be [S, slot]");
        const std::int64_t slot = grad.size(1);
        expect("grad", grad, kDtype, {S, slot});
        const auto* from = data<float>(grad);
        for (const Crop& crop : expect_crops(g, cin, cout, S, depthwise)) {
            STD_TORCH_CHECK(crop.size <= slot, "a crop of ", crop.cout, " × ", crop.cin, " channels has ",
                            crop.size, " numbers, its slot ", slot);
            factors.push_back({crop, from});
            from += slot;
        }
    }

    Factors(const Generator& g, const Tensors& step_codes, const Tensors& grads, const Tensors& cin,
            const Tensors& cout, bool depthwise) {
        const std::size_t T = step_codes.size();
        STD_TORCH_CHECK(grads.size() == T && cin.size() == T && cout.size() == T,
                        "every factor must have codes, a grad, cin and cout");
        for (std::size_t j = 0; j < T; ++j) {
            STD_TORCH_CHECK(step_codes[j].dim() == 2, "codes must be [S, H]");
            const std::int64_t S = step_codes[j].size(0);
            expect("codes", step_codes[j], kDtype, {S, g.H});
            append(g, grads[j], cin[j], cout[j], S, depthwise);
            for (std::int64_t s = 0; s < S; ++s) {
                codes.push_back(data<float>(step_codes[j]) + s * g.H);
                steps.push_back(j);
            }
        }
    }

    std::int64_t size() const { return static_cast<std::int64_t>(factors.size()); }
    // The number of a factor: that of its step, behind those of basis and momentum.
    double number(const Numbers& coefficients, std::int64_t f) const { return coefficients[2 + steps[f]]; }
};

void expect_coefficients(const char* name, const Numbers& coefficients, std::size_t steps) {
    STD_TORCH_CHECK(coefficients.size() == 2 + steps, name, " must be 2 + ", steps, " numbers");
}

Combination combination(const Numbers& coefficients, const float* numbers) {
    return {static_cast<float>(coefficients[0]), static_cast<float>(coefficients[1]), numbers};
}

double product(const float* a, const float* b, std::int64_t H) {
    double sum = 0;
    for (std::int64_t h = 0; h < H; ++h) sum += static_cast<double>(a[h]) * b[h];
    return sum;
}

// Calls run(begin, end) for ranges of the blocks of `numbers` numbers.
template <typename Run>
void for_blocks(std::int64_t numbers, const Run& run) {
    // Blocks a thread should take at least: about a million numbers.
    const std::int64_t grain = 1 + 1000000 * kUpdateBlocks / (numbers + 1);
    torch::stable::parallel_for(0, kUpdateBlocks, grain, run);
}

std::int64_t size_of(const Generator& g) { return g.O * g.I * g.K * g.H; }

// The gradients of the codes from the sums of all blocks.
Tensor finish_code_gradients(const Tensor& basis, const CodeGradients& a, const std::vector<double>& partial,
                             const Factors& pending, const Numbers& coefficients) {
    const std::int64_t H = a.generator.H, S = a.F - a.pending, width = H + a.pending;
    const Tensor d_codes = torch::stable::new_empty(basis, {S, H});
    auto* to = mutable_data<float>(d_codes);
    for (std::int64_t s = 0; s < S; ++s) {
        Numbers sums(width);
        for (std::int64_t n = 0; n < width; ++n) {
            for (std::int64_t block = 0; block < kUpdateBlocks; ++block)
                sums[n] += partial[block * a.sums() + s * width + n];
        }
        for (std::int64_t f = 0; f < a.pending; ++f) {
            const double times = pending.number(coefficients, f) * sums[H + f];
            for (std::int64_t h = 0; h < H; ++h) sums[h] += times * pending.codes[f][h];
        }
        for (std::int64_t h = 0; h < H; ++h) to[s * H + h] = static_cast<float>(sums[h]);
    }
    return d_codes;
}

Tensor generate_delayed_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                            const Tensor& bias_momentum, const Tensors& factor_codes,
                            const Tensors& factor_grads, const Tensors& factor_cin,
                            const Tensors& factor_cout, bool depthwise, const Numbers& coefficients,
                            const Tensor& codes, const Tensor& cin, const Tensor& cout) {
    GenerateDelayed args{};
    args.generator = expect_generator(basis, bias, basis_momentum, bias_momentum, depthwise);
    const std::int64_t H = args.generator.H;
    const Factors factors(args.generator, factor_codes, factor_grads, factor_cin, factor_cout, depthwise);
    expect_coefficients("coefficients", coefficients, factor_codes.size());
    STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) > 0, "codes must be [S, H] and not empty");
    args.S = codes.size(0);
    args.F = factors.size();
    args.factors = factors.factors.data();
    expect("codes", codes, kDtype, {args.S, H});
    args.codes = data<float>(codes);
    const std::vector<Crop> crops = expect_crops(args.generator, cin, cout, args.S, depthwise);
    args.crops = crops.data();

    std::vector<float> numbers;
    for (std::int64_t s = 0; s < args.S; ++s) {
        for (std::int64_t f = 0; f < args.F; ++f) {
            const double times = 1 + product(args.codes + s * H, factors.codes[f], H);
            numbers.push_back(static_cast<float>(factors.number(coefficients, f) * times));
        }
    }
    args.change = combination(coefficients, numbers.data());

    const std::int64_t slot = slot_of(args.generator, depthwise);
    const Tensor weight = new_buffer(basis, {args.S, slot});
    std::vector<float*> weights;
    for (std::int64_t s = 0; s < args.S; ++s) weights.push_back(mutable_data<float>(weight) + s * slot);
    args.weights = weights.data();
    const Isa isa = chosen_isa();
    for_blocks(size_of(args.generator),
               [&](std::int64_t begin, std::int64_t end) { generate_delayed(isa, args, begin, end); });
    return weight;
}

Tensor code_gradients_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                          const Tensor& bias_momentum, const Tensors& factor_codes,
                          const Tensors& factor_grads, const Tensors& factor_cin, const Tensors& factor_cout,
                          bool depthwise, const Numbers& coefficients, const Tensor& grad, const Tensor& cin,
                          const Tensor& cout) {
    CodeGradients args{};
    args.generator = expect_generator(basis, bias, basis_momentum, bias_momentum, depthwise);
    Factors factors(args.generator, factor_codes, factor_grads, factor_cin, factor_cout, depthwise);
    expect_coefficients("coefficients", coefficients, factor_codes.size());
    args.pending = factors.size();
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) > 0, "grad must be [S, slot] and not empty");
    factors.append(args.generator, grad, cin, cout, grad.size(0), depthwise);
    args.F = factors.size();
    args.factors = factors.factors.data();
    args.change = combination(coefficients, nullptr);

    Numbers partial(kUpdateBlocks * args.sums());
    const Isa isa = chosen_isa();
    for_blocks(size_of(args.generator), [&](std::int64_t begin, std::int64_t end) {
        code_gradients(isa, args, partial.data(), begin, end);
    });
    return finish_code_gradients(basis, args, partial, factors, coefficients);
}

Tensor update_generators_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                             const Tensor& bias_momentum, const Tensors& codes, const Tensors& grads,
                             const Tensors& cin, const Tensors& cout, bool depthwise, const Numbers& before,
                             const Numbers& weights, const Numbers& momentum) {
    UpdateGenerators args{};
    CodeGradients& gradients = args.gradients;
    gradients.generator = expect_generator(basis, bias, basis_momentum, bias_momentum, depthwise);
    const Factors factors(gradients.generator, codes, grads, cin, cout, depthwise);
    STD_TORCH_CHECK(factors.size() > 0, "there must be at least one factor");
    expect_coefficients("weights", weights, codes.size());
    expect_coefficients("momentum", momentum, codes.size());
    gradients.F = gradients.pending = factors.size();
    gradients.factors = factors.factors.data();
    if (!before.empty()) {
        expect_coefficients("before", before, codes.size() - 1);
        gradients.pending -= codes.back().size(0);
        gradients.change = combination(before, nullptr);
    }

    std::vector<float> to_basis, to_momentum, basis_codes, momentum_codes;
    for (std::int64_t f = 0; f < gradients.F; ++f) {
        to_basis.push_back(static_cast<float>(factors.number(weights, f)));
        to_momentum.push_back(static_cast<float>(factors.number(momentum, f)));
        for (std::int64_t h = 0; h < gradients.generator.H; ++h) {
            basis_codes.push_back(to_basis[f] * factors.codes[f][h]);
            momentum_codes.push_back(to_momentum[f] * factors.codes[f][h]);
        }
    }
    args.basis = combination(weights, to_basis.data());
    args.momentum = combination(momentum, to_momentum.data());
    args.basis_codes = basis_codes.data();
    args.momentum_codes = momentum_codes.data();

    Numbers partial(kUpdateBlocks * gradients.sums());
    const Isa isa = chosen_isa();
    for_blocks(size_of(gradients.generator), [&](std::int64_t begin, std::int64_t end) {
        update_generators(isa, args, partial.data(), begin, end);
    });
    return finish_code_gradients(basis, gradients, partial, factors, before);
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("generate_delayed", TORCH_BOX(&metaprune::generate_delayed_cpu));
    m.impl("code_gradients", TORCH_BOX(&metaprune::code_gradients_cpu));
    m.impl("update_generators_", TORCH_BOX(&metaprune::update_generators_cpu));
}
