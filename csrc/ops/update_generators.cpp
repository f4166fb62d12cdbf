// Registers the ops that train weight generators on the CPU. Schemas and fake kernels are declared in
// kernels/ops.py.

#include "update_generators.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "buffers.h"

namespace metaprune {
namespace {

constexpr ScalarType kDtype = ScalarType::Float;

// The rows of a generator, and what has become of them since they were last written.
Generator expect_generator(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                           const Tensor& bias_momentum, const Tensor& written, const Tensor& drift,
                           bool depthwise) {
    STD_TORCH_CHECK(basis.dim() == 4, "basis must be [O, I, K, H]");
    const std::int64_t O = basis.size(0), I = basis.size(1), K = basis.size(2), H = basis.size(3);
    STD_TORCH_CHECK(O * I * K > 0, "basis must not be empty, but for H");
    STD_TORCH_CHECK(!depthwise || I == 1, "a depthwise basis must be [C, 1, K, H]");
    expect("basis", basis, kDtype, {O, I, K, H});
    expect("bias", bias, kDtype, {O, I, K});
    const bool half_momentum = basis_momentum.scalar_type() == ScalarType::BFloat16;
    expect("basis_momentum", basis_momentum, half_momentum ? ScalarType::BFloat16 : kDtype, {O, I, K, H});
    expect("bias_momentum", bias_momentum, kDtype, {O, I, K});
    expect("written", written, ScalarType::Byte, {O, I});
    expect("drift", drift, kDtype, {kDrifts, 4});
    return {O,
            depthwise ? K : I,
            depthwise ? 1 : K,
            H,
            K,
            mutable_data<float>(basis),
            basis_momentum.mutable_data_ptr(),
            mutable_data<float>(bias),
            mutable_data<float>(bias_momentum),
            half_momentum,
            data<std::uint8_t>(written),
            reinterpret_cast<const Drift*>(data<float>(drift))};
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

std::vector<Factor> expect_factors(const Generator& g, const Tensor& codes, const Tensor& grad,
                                   const Tensor& cin, const Tensor& cout, bool depthwise) {
    STD_TORCH_CHECK(codes.dim() == 2 && grad.dim() == 2, "codes must be [S, H], grad [S, slot]");
    const std::int64_t S = codes.size(0), slot = grad.size(1);
    expect("codes", codes, kDtype, {S, g.H});
    expect("grad", grad, kDtype, {S, slot});
    std::vector<Factor> factors;
    for (const Crop& crop : expect_crops(g, cin, cout, S, depthwise)) {
        STD_TORCH_CHECK(crop.size <= slot, "a crop of ", crop.cout, " × ", crop.cin, " channels has ",
                        crop.size, " numbers, its slot ", slot);
        const auto s = static_cast<std::int64_t>(factors.size());
        factors.push_back({crop, data<float>(grad) + s * slot, data<float>(codes) + s * g.H});
    }
    return factors;
}

// Calls run(begin, end) for ranges of the blocks of `numbers` numbers.
template <typename Run>
void for_blocks(std::int64_t numbers, const Run& run) {
    // Blocks a thread should take at least: about a quarter of a million numbers.
    const std::int64_t grain = 1 + 250000 * kUpdateBlocks / (numbers + 1);
    torch::stable::parallel_for(0, kUpdateBlocks, grain, run);
}

std::int64_t size_of(const Generator& g) { return g.O * g.I * g.K * g.H; }

Tensor generate_delayed_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                            const Tensor& bias_momentum, const Tensor& written, const Tensor& drift,
                            const Tensor& codes, const Tensor& cin, const Tensor& cout, bool depthwise) {
    GenerateDelayed args{};
    args.generator = expect_generator(basis, bias, basis_momentum, bias_momentum, written, drift, depthwise);
    STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) > 0, "codes must be [S, H] and not empty");
    args.S = codes.size(0);
    expect("codes", codes, kDtype, {args.S, args.generator.H});
    args.codes = data<float>(codes);
    const std::vector<Crop> crops = expect_crops(args.generator, cin, cout, args.S, depthwise);
    args.crops = crops.data();

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

// Notes after which step the rows of all crops, or of all channels, were written.
void note_written(const UpdateGenerators& a, std::uint8_t* written, std::int64_t step) {
    const Generator& g = a.generator;
    const std::int64_t across = g.row_length() / g.taps;
    if (a.everywhere) {
        std::fill_n(written, g.O * across, static_cast<std::uint8_t>(0));
        return;
    }
    for (std::int64_t f = 0; f < a.F; ++f) {
        const Crop& crop = a.factors[f].crop;
        for (std::int64_t o = 0; o < crop.cout; ++o)
            std::fill_n(written + o * across, crop.cin * g.K / g.taps, static_cast<std::uint8_t>(step));
    }
}

Tensor update_generators_cpu(const Tensor& basis, const Tensor& bias, const Tensor& basis_momentum,
                             const Tensor& bias_momentum, const Tensor& written, const Tensor& drift,
                             const Tensor& codes, const Tensor& grad, const Tensor& cin, const Tensor& cout,
                             bool depthwise, double lr, double momentum, double weight_decay, bool everywhere,
                             std::int64_t step) {
    UpdateGenerators args{};
    args.generator = expect_generator(basis, bias, basis_momentum, bias_momentum, written, drift, depthwise);
    const std::vector<Factor> factors = expect_factors(args.generator, codes, grad, cin, cout, depthwise);
    STD_TORCH_CHECK(everywhere || (step > 0 && step < kDrifts), "step is ", step, "; legal values are 1..",
                    kDrifts - 1);
    args.F = static_cast<std::int64_t>(factors.size());
    args.factors = factors.data();
    args.everywhere = everywhere;
    args.lr = static_cast<float>(lr);
    args.momentum = static_cast<float>(momentum);
    args.weight_decay = static_cast<float>(weight_decay);

    const std::int64_t size = args.F * args.generator.H;
    std::vector<double> partial(static_cast<std::size_t>(kUpdateBlocks * size));
    const Isa isa = chosen_isa();
    for_blocks(size_of(args.generator), [&](std::int64_t begin, std::int64_t end) {
        update_generators(isa, args, partial.data(), begin, end);
    });
    note_written(args, mutable_data<std::uint8_t>(written), step);

    const Tensor d_codes = torch::stable::new_empty(codes, {args.F, args.generator.H});
    auto* to = mutable_data<float>(d_codes);
    for (std::int64_t n = 0; n < size; ++n) {
        double sum = 0;
        for (std::int64_t block = 0; block < kUpdateBlocks; ++block) sum += partial[block * size + n];
        to[n] = static_cast<float>(sum);
    }
    return d_codes;
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("generate_delayed", TORCH_BOX(&metaprune::generate_delayed_cpu));
    m.impl("update_generators_", TORCH_BOX(&metaprune::update_generators_cpu));
}
