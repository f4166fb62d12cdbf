#include "ragged_depthwise_backward.h"

#include <cstddef>
#include <cstdint>

#include "workspace.h"

#define METAPRUNE_BODY "ragged_depthwise_backward.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
void ragged_depthwise_backward(Isa isa, const RaggedDepthwiseBackward<T>& args, std::int64_t begin,
                               std::int64_t end) {
    METAPRUNE_CALL(isa, ragged_depthwise_backward(args, begin, end));
}

#define INSTANTIATE(T)                                                                            \
    template void ragged_depthwise_backward(Isa, const RaggedDepthwiseBackward<T>&, std::int64_t, \
                                            std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
