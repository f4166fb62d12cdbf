#include "ragged_normalise_backward.h"

#include <cstddef>
#include <cstdint>

#include "workspace.h"

#define METAPRUNE_BODY "ragged_normalise_backward.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
void ragged_normalise_backward(Isa isa, const RaggedNormaliseBackward<T>& args,
                               const NormaliseGradients<T>& gradients, std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL(isa, ragged_normalise_backward(args, gradients, begin, end));
}

template <typename T>
void ragged_shortcut_backward(Isa isa, const RaggedNormaliseBackward<T>& args, const SlotReaders& readers,
                              T* grad_shortcut, std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL(isa, ragged_shortcut_backward(args, readers, grad_shortcut, begin, end));
}

#define INSTANTIATE(T)                                                                                     \
    template void ragged_normalise_backward(Isa, const RaggedNormaliseBackward<T>&,                        \
                                            const NormaliseGradients<T>&, std::int64_t, std::int64_t);     \
    template void ragged_shortcut_backward(Isa, const RaggedNormaliseBackward<T>&, const SlotReaders&, T*, \
                                           std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
