#include "convolution.h"

#include <cstddef>

#include "workspace.h"

#if defined(METAPRUNE_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

#define METAPRUNE_BODY "convolution.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
std::int64_t images_per_group(const Chain<T>& chain) {
    constexpr std::int64_t kPixels = 196;
    const std::int64_t pixels = chain.size(chain.H, chain.stages) * chain.size(chain.W, chain.stages);
    return pixels >= kPixels ? 1 : (kPixels + pixels - 1) / pixels;
}

template <>
void run_chain(Isa isa, const Chain<float>& chain, std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL_FLOAT(isa, run_chain(chain, false, begin, end));
}

template <>
void run_chain(Isa isa, const Chain<BFloat16>& chain, std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL(isa, run_chain(chain, isa == Isa::amx, begin, end));
}

template std::int64_t images_per_group(const Chain<float>&);
template std::int64_t images_per_group(const Chain<BFloat16>&);

}  // namespace metaprune
