// Products of matrices in shared memory by one warp: 32 rows of pixels by units of 16 columns, accumulated in
// float32.
//
// bfloat16 and float16 are multiplied by tensor cores (mma m16n8k16); float32 exactly, one by one, by the
// lanes that hold the same sums.
//
// Legend: M pixels, K channels in, N channels out.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "thread.cuh"

namespace metaprune::cuda {

// Two numbers that lie side by side.
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* from) {
    if constexpr (sizeof(T) == 4) {
        return *reinterpret_cast<const float2*>(from);
    } else {
        return unpack<T>(*reinterpret_cast<const std::uint32_t*>(from));
    }
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {
    if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(to) = float2{first, second};
    } else {
        *reinterpret_cast<std::uint32_t*>(to) = pack<T>(first, second);
    }
}

__device__ __forceinline__ float clamped(float value, Clamp clamp) {
    return smaller(larger(value, clamp.low), clamp.high);
}

// A lane's share of 32 × (16 · UNITS) sums. Of the tile of 16 × 8 at [i, j] it has [lane / 4, lane % 4 · 2],
// the number behind it, and the two that lie eight rows below.
template <int UNITS>
struct Accumulators {
    float tile[2][2 * UNITS][4];
};

// Calls function(r, n, first, second) for every pair of sums of this lane: those at (8 r + lane / 4, n) and
// (…, n + 1).
template <int UNITS, typename Function>
__device__ __forceinline__ void for_each_pair(const Accumulators<UNITS>& sum, const Function& function) {
    const int lane = thread_number() % kWarp;
#pragma unroll
    for (int j = 0; j < 2 * UNITS; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                function(i * 2 + half, j * 8 + lane % 4 * 2, sum.tile[i][j][2 * half],
                         sum.tile[i][j][2 * half + 1]);
            }
        }
    }
}

// multiply() for as many units as there are: without branches between products, loads run ahead of them.
template <int HAVE, typename T, int UNITS>
__device__ __forceinline__ void multiply_units(Accumulators<UNITS>& sum, const T* a, int a_pitch, const T* b,
                                               int b_pitch, int depth, int step) {
    const int lane = thread_number() % kWarp, row = lane % 16, column = lane / 16 * 8;
    a += row * a_pitch + column;
    b += row * b_pitch + column;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
        std::uint32_t rows[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) load_matrices(rows[i], a + i * 16 * a_pitch + k);
#pragma unroll
        for (int u = 0; u < HAVE; ++u) {
            std::uint32_t columns[4];
            load_matrices_transposed(columns, b + k * b_pitch + u * step);
            const std::uint32_t left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                multiply_add<T>(sum.tile[i][2 * u], rows[i], left);
                multiply_add<T>(sum.tile[i][2 * u + 1], rows[i], right);
            }
        }
    }
}

template <int HAVE, int UNITS>
__device__ __forceinline__ void multiply_units(Accumulators<UNITS>& sum, const float* a, int a_pitch,
                                               const float* b, int b_pitch, int depth, int step) {
    const int lane = thread_number() % kWarp;
    a += lane / 4 * a_pitch;
    b += lane % 4 * 2;
    for (int k = 0; k < depth; k += 2) {
        float2 rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = load_pair(a + i * 8 * a_pitch + k);
#pragma unroll
        for (int j = 0; j < 2 * HAVE; ++j) {
            const float* column = b + k * b_pitch + j / 2 * step + j % 2 * 8;
            const float2 first = load_pair(column), second = load_pair(column + b_pitch);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float* at = sum.tile[i / 2][j] + i % 2 * 2;
                at[0] += rows[i].x * first.x;
                at[1] += rows[i].x * first.y;
                at[0] += rows[i].y * second.x;
                at[1] += rows[i].y * second.y;
            }
        }
    }
}

// sum += a · b for a [32, depth] and b [depth, N]; depth is a multiple of 16. Unit u of the sums is columns
// [u · step, u · step + 16) of b; sums of units from `units` on are left alone. The whole warp calls it.
template <int HAVE, typename T, int UNITS>
__device__ __forceinline__ void multiply(Accumulators<UNITS>& sum, const T* a, int a_pitch, const T* b,
                                         int b_pitch, int depth, int units, int step) {
    if (units >= HAVE) {
        multiply_units<HAVE>(sum, a, a_pitch, b, b_pitch, depth, step);
    } else if constexpr (HAVE > 1) {
        multiply<HAVE - 1>(sum, a, a_pitch, b, b_pitch, depth, units, step);
    }
}

}  // namespace metaprune::cuda
