// Compiles one kernel body once per instruction set, each in a namespace of its own: define METAPRUNE_BODY as
// the file with the body and include this one. The body sees kLanes, the floats in a register, and
// vector.inc, and METAPRUNE_AVX2, METAPRUNE_AVX512 and METAPRUNE_BF16 where it may use those instructions.
//
// A body must not call inline functions of the standard library: the linker keeps one copy of each, and that
// could be the one compiled for a processor that is not there.
//
// METAPRUNE_CALL(isa, function(arguments)) then calls the function of that name compiled for `isa`.

#include <cstdint>
#include <type_traits>
#include <utility>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace metaprune::portable {
constexpr int kLanes = 4;
#include "vector.inc"
#include METAPRUNE_BODY
}  // namespace metaprune::portable

#if !defined(__x86_64__)

#define METAPRUNE_CALL(isa, ...) static_cast<void>(isa), portable::__VA_ARGS__
#define METAPRUNE_CALL_FLOAT METAPRUNE_CALL

#else

// The levels avx512_bf16 and amx are one body: tiles are the business of the kernel that has a use for them.
#define METAPRUNE_CALL(isa, ...)             \
    switch (isa) {                           \
        case Isa::amx:                       \
        case Isa::avx512_bf16:               \
            return avx512_bf16::__VA_ARGS__; \
        case Isa::avx512:                    \
            return avx512::__VA_ARGS__;      \
        case Isa::avx2:                      \
            return avx2::__VA_ARGS__;        \
        case Isa::portable:                  \
            return portable::__VA_ARGS__;    \
    }

// For functions that compute on float alone: what avx512_bf16 adds would be compiled for nothing.
#define METAPRUNE_CALL_FLOAT(isa, ...)    \
    switch (isa) {                        \
        case Isa::amx:                    \
        case Isa::avx512_bf16:            \
        case Isa::avx512:                 \
            return avx512::__VA_ARGS__;   \
        case Isa::avx2:                   \
            return avx2::__VA_ARGS__;     \
        case Isa::portable:               \
            return portable::__VA_ARGS__; \
    }

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define METAPRUNE_AVX2 1
namespace metaprune::avx2 {
constexpr int kLanes = 8;
#include "vector.inc"
#include METAPRUNE_BODY
}  // namespace metaprune::avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define METAPRUNE_AVX512 1
namespace metaprune::avx512 {
constexpr int kLanes = 16;
#include "vector.inc"
#include METAPRUNE_BODY
}  // namespace metaprune::avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,prefer-vector-width=512")
#endif
#define METAPRUNE_BF16 1
namespace metaprune::avx512_bf16 {
constexpr int kLanes = 16;
#include "vector.inc"
#include METAPRUNE_BODY
}  // namespace metaprune::avx512_bf16
#undef METAPRUNE_BF16
#undef METAPRUNE_AVX512
#undef METAPRUNE_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
