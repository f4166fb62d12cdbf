// Kernels that test what emulates a GPU (test_emulation.py), some of them wrong on purpose.

#include <cstdint>

#include "thread.cuh"

using namespace metaprune;

namespace {

// c [16, 8] = a [16, 16] · b, in T, by one warp: through shared memory, as a kernel would.
template <typename T>
__global__ void product(const T* a, const T* b, float* c) {
    auto* shared = reinterpret_cast<T*>(shared_memory());
    const unsigned lane = threadIdx.x;
    copy_async(shared + lane * 8, a + lane * 8);
    if (lane < 16) copy_async(shared + 256 + lane * 8, b + lane * 8);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    std::uint32_t of_a[4], of_b[4];
    load_matrices(of_a, shared + lane % 16 * 16 + lane / 16 * 8);
    load_matrices_transposed(of_b, shared + 256 + lane % 16 * 8);
    float sum[4] = {};
    multiply_add<T>(sum, of_a, {of_b[0], of_b[1]});
    for (unsigned i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// sums[t] of each of two warps: the sum of its 32 numbers, in every lane; then the next lane's, 31 its own.
__global__ void shuffles(const float* x, float* sums, float* next) {
    const unsigned t = threadIdx.x;
    float sum = x[t];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    sums[t] = sum;
    next[t] = __shfl_down_sync(0xffffffffu, x[t], 1);
}

// y[t] = x[the thread opposite], through shared memory.
template <bool kBarrier>
__global__ void opposite(const float* x, float* y) {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = x[threadIdx.x];
    if (kBarrier) __syncthreads();
    y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// y[t] = x[t], four at a time, by copies of two groups of which `kPending` are not waited for.
template <int kPending>
__global__ void copies(const float* x, float* y) {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    const unsigned t = threadIdx.x * 8;
    copy_async(shared + t, x + t);
    commit_copies();
    copy_async(shared + t + 4, x + t, false);
    commit_copies();
    wait_for_copies<kPending>();
    for (unsigned i = t; i < t + 8; ++i) y[i] = shared[i];
}

__global__ void reads_beyond(float* y) { y[0] = reinterpret_cast<float*>(shared_memory())[blockDim.x * 4]; }
__global__ void writes_before(float* y) { reinterpret_cast<float*>(shared_memory())[-1] = y[0]; }
__global__ void copies_beyond(const float* x) { copy_async(shared_memory() + blockDim.x * 16, x); }
__global__ void copies_misaligned(const float* x) { copy_async(shared_memory(), x + 1); }
__global__ void leaves_others_waiting(float* y) {
    if (threadIdx.x == 0) return;
    __syncthreads();
    y[0] = 0.0f;
}

const char* one_block(void (*kernel)(const float*, float*), unsigned threads, const float* x, float* y) {
    return launch(kernel, dim3{1}, dim3{threads}, threads * 32, nullptr, x, y);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) void

EXPORTED product_bfloat16(const BFloat16* a, const BFloat16* b, float* c) {
    launch(product<BFloat16>, dim3{1}, dim3{32}, 768, nullptr, a, b, c);
}
EXPORTED product_float16(const Float16* a, const Float16* b, float* c) {
    launch(product<Float16>, dim3{1}, dim3{32}, 768, nullptr, a, b, c);
}
EXPORTED both_shuffles(const float* x, float* sums, float* next) {
    launch(shuffles, dim3{1}, dim3{64}, 0, nullptr, x, sums, next);
}
EXPORTED with_barrier(const float* x, float* y) { one_block(opposite<true>, 64, x, y); }
EXPORTED without_barrier(const float* x, float* y) { one_block(opposite<false>, 64, x, y); }
EXPORTED all_copies(const float* x, float* y) { one_block(copies<0>, 8, x, y); }
EXPORTED all_but_one(const float* x, float* y) { one_block(copies<1>, 8, x, y); }
EXPORTED beyond(const float*, float* y) { launch(reads_beyond, dim3{1}, dim3{32}, 512, nullptr, y); }
EXPORTED before(const float*, float* y) { launch(writes_before, dim3{1}, dim3{32}, 512, nullptr, y); }
EXPORTED copy_beyond(const float* x, float*) { launch(copies_beyond, dim3{1}, dim3{32}, 512, nullptr, x); }
EXPORTED copy_misaligned(const float* x, float*) {
    launch(copies_misaligned, dim3{1}, dim3{32}, 512, nullptr, x);
}
EXPORTED waiting(const float*, float* y) { launch(leaves_others_waiting, dim3{1}, dim3{32}, 0, nullptr, y); }
EXPORTED too_much(const float* x, float* y) {
    launch(opposite<true>, dim3{1}, dim3{32}, 228 * 1024, nullptr, x, y);
}
EXPORTED rounded(const float* x, std::uint32_t* bfloats, std::uint32_t* halves, float* back) {
    *bfloats = pack<BFloat16>(x[0], x[1]);
    *halves = pack<Float16>(x[0], x[1]);
    back[0] = unpack<BFloat16>(*bfloats).y;
    back[1] = unpack<Float16>(*halves).y;
}
EXPORTED clamps(const float* x, float* y) {
    y[0] = larger(x[0], x[1]);
    y[1] = smaller(x[0], x[1]);
}
