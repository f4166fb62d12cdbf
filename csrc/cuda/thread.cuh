// What a kernel needs of the machine: blocks of threads, shared memory, copies into it that run ahead,
// exchanges within a warp, tensor cores. By nvcc it is the GPU; by a C++ compiler it is the CPU (emulated.h),
// so that tests run the same kernels without a GPU.
//
// All shared memory is dynamic and comes from shared_memory(): under emulation it has exactly the size of the
// launch, begins as NaN, and what lies beyond it must not be touched. The functions that exchange are called
// by all 32 threads of a warp.

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulated.h"
#endif

#include "clamp.h"
#include "storage.h"

namespace metaprune {

inline constexpr int kWarp = 32;
// What a copy or an access moves at once.
inline constexpr int kVectorBytes = 16;

#ifdef __CUDACC__

// Queues `kernel` on a stream; null, or what CUDA says against it. Never waits.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, void* stream,
                   Parameters... arguments) {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    cudaError_t error = cudaSuccess;
    if (shared > kWithoutAsking) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared));
    }
    if (error == cudaSuccess) {
        kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// threadIdx.x, which the compiler takes for a new number each time: what it computes from one is not kept in
// registers until another is asked for.
__device__ __forceinline__ int thread_number() {
    int number = static_cast<int>(threadIdx.x);
    asm volatile("" : "+r"(number));
    __builtin_assume(number >= 0 && number < 1024);
    return number;
}

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Begins to copy 16 bytes, both sides aligned to as many; zeros instead if not `valid`, and `global` is not
// read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? kVectorBytes : 0)
                 : "memory");
}

// Begins to copy the first `kept` of kBytes (4 or 16), both sides aligned to as many; zeros behind them.
template <int kBytes>
__device__ __forceinline__ void copy_async_part(void* shared, const void* global, int kept) {
    if constexpr (kBytes == kVectorBytes) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(kept)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(kept)
                     : "memory");
    }
}

// Closes this thread's group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the last `kPending`. Other threads see the copies after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 × 8 matrices of 16-bit numbers: `row` is where this thread's row of 16 bytes begins, threads 8 j to
// 8 j + 7 naming those of matrix j. words[j] holds elements (lane / 4, lane % 4 · 2) and the next of matrix
// j.
__device__ __forceinline__ void load_matrices(std::uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a · b, of [16, 16] and [16, 8] in T, bfloat16 or float16, with fragments as PTX lays out mma.m16n8k16.
// With g = lane / 4 and t = lane % 4 · 2: a[0] is (g, t), a[1] (g + 8, t), a[2] (g, t + 8), a[3] (g + 8, t +
// 8), each with the next column above it; b[0] (t, g), b[1] (t + 8, g), with the next row; c[0], c[1] (g, t)
// and the next column, c[2], c[3] the same of row g + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]) {
    static_assert(sizeof(T) == 2);
    if constexpr (kIsBFloat16<T>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// The larger and the smaller of two numbers; NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float smaller(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// The same of the two numbers in a word.
template <typename T>
__device__ __forceinline__ std::uint32_t larger_pair(std::uint32_t a, std::uint32_t b) {
    std::uint32_t result;
    if constexpr (kIsBFloat16<T>) {
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
}
template <typename T>
__device__ __forceinline__ std::uint32_t smaller_pair(std::uint32_t a, std::uint32_t b) {
    std::uint32_t result;
    if constexpr (kIsBFloat16<T>) {
        asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
        asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
}

// Two 16-bit numbers in a word, the first in its lower half.
template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t word) {
    if constexpr (kIsBFloat16<T>) return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    __half2 pair;
    memcpy(&pair, &word, sizeof word);
    return __half22float2(pair);
}
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
    std::uint32_t word;
    if constexpr (kIsBFloat16<T>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&word, &pair, sizeof word);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&word, &pair, sizeof word);
    }
    return word;
}

#endif

// Numbers of T that one access of 16 bytes moves.
template <typename T>
inline constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

// Reads or writes 16 bytes, aligned to as many, as float.
template <typename T>
__device__ __forceinline__ void load_vector(const T* from, float (&value)[kPerVector<T>]) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < 4; ++i) memcpy(&value[i], &word[i], sizeof(float));
    } else {
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(word[i]);
            value[2 * i] = pair.x;
            value[2 * i + 1] = pair.y;
        }
    }
}
template <typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&value)[kPerVector<T>]) {
    std::uint32_t word[4];
    if constexpr (sizeof(T) == 4) {
        memcpy(word, value, sizeof word);
    } else {
        for (int i = 0; i < 4; ++i) word[i] = pack<T>(value[2 * i], value[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(to) = uint4{word[0], word[1], word[2], word[3]};
}

// Writes clamp(value): the bounds are numbers of T, so that numbers may be rounded first and compared in
// pairs.
template <typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&value)[kPerVector<T>], Clamp clamp) {
    std::uint32_t word[4];
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < 4; ++i) {
            const float clamped = smaller(larger(value[i], clamp.low), clamp.high);
            memcpy(&word[i], &clamped, sizeof clamped);
        }
    } else {
        const std::uint32_t low = pack<T>(clamp.low, clamp.low), high = pack<T>(clamp.high, clamp.high);
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t pair = pack<T>(value[2 * i], value[2 * i + 1]);
            word[i] = smaller_pair<T>(larger_pair<T>(pair, low), high);
        }
    }
    *reinterpret_cast<uint4*>(to) = uint4{word[0], word[1], word[2], word[3]};
}

}  // namespace metaprune
