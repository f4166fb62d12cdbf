#include "ragged_max_pool.h"

#include <cstdint>

#define METAPRUNE_BODY "ragged_max_pool.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
void ragged_max_pool(Isa isa, const RaggedMaxPool<T>& args, std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL(isa, ragged_max_pool(args, begin, end));
}

#define INSTANTIATE(T) \
    template void ragged_max_pool(Isa, const RaggedMaxPool<T>&, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
