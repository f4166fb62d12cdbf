#include "generate_weights.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace metaprune {
namespace {

// Working memory of one thread.
struct Scratch {
    float* rows;                // [16, padded_hidden(H)]
    float* gradients;           // [S, 16]
    std::int32_t* subnetworks;  // [S]
};

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "generate_weights.inc"
#include "for_each_isa.h"

namespace metaprune {
namespace {

class Workspace {
  public:
    Workspace(std::int64_t S, std::int64_t H)
        : floats_(kMaxLanes * (padded_hidden(H) + S + 1)), subnetworks_(S), hidden_(padded_hidden(H)) {}

    Scratch scratch() {
        void* aligned = floats_.data();
        std::size_t space = floats_.size() * sizeof(float);
        float* rows = static_cast<float*>(std::align(kMaxLanes * sizeof(float), 1, aligned, space));
        return {rows, rows + kMaxLanes * hidden_, subnetworks_.data()};
    }

  private:
    static constexpr std::int64_t kMaxLanes = 16;
    std::vector<float> floats_;
    std::vector<std::int32_t> subnetworks_;
    std::int64_t hidden_;
};

}  // namespace

template <typename T>
void generate_weights(Isa isa, const GenerateWeights<T>& args, T* weight, std::int64_t begin,
                      std::int64_t end) {
    Workspace workspace(args.S, args.H);
    METAPRUNE_CALL(isa, generate_weights(args, weight, workspace.scratch(), begin, end));
}

template <typename T>
void generate_weights_backward(Isa isa, const GenerateWeights<T>& args,
                               const GenerateWeightsGradients<T>& gradients, std::int64_t begin,
                               std::int64_t end) {
    Workspace workspace(args.S, args.H);
    METAPRUNE_CALL(isa, generate_weights_backward(args, gradients, workspace.scratch(), begin, end));
}

#define INSTANTIATE(T)                                                                              \
    template void generate_weights(Isa, const GenerateWeights<T>&, T*, std::int64_t, std::int64_t); \
    template void generate_weights_backward(Isa, const GenerateWeights<T>&,                         \
                                            const GenerateWeightsGradients<T>&, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
