#include "ragged_max_pool_backward.h"

#include <cstddef>
#include <cstdint>

#include "workspace.h"

#define METAPRUNE_BODY "ragged_max_pool_backward.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
void ragged_max_pool_backward(Isa isa, const RaggedMaxPoolBackward<T>& args, std::int64_t begin,
                              std::int64_t end) {
    METAPRUNE_CALL(isa, ragged_max_pool_backward(args, begin, end));
}

#define INSTANTIATE(T) \
    template void ragged_max_pool_backward(Isa, const RaggedMaxPoolBackward<T>&, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
