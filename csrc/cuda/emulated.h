// A GPU made of the CPU, for tests: what thread.cuh promises, for a C++ compiler.
//
// Blocks run one after another. Each of a block's threads is a fiber that runs until it waits for others, and
// the order in which they run is drawn anew after every wait: without a barrier that is needed, results are
// wrong. A copy that runs ahead happens when it is waited for and not before. Shared memory is NaN when a
// block begins, and ends at a page that nobody may touch. Threads that can no longer meet, misaligned
// accesses and writes before the beginning of shared memory end the process with one line.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "storage.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace metaprune::emulated {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated GPU: %s, in thread %u of block (%u, %u, %u)\n", what, threadIdx.x,
                 blockIdx.x, blockIdx.y, blockIdx.z);
    std::abort();
}

inline void* pages(std::size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    return memory;
}

inline constexpr std::size_t kPage = 4096;

struct Copy {
    void* to;
    const void* from;
    int bytes, kept;  // zeros behind what is kept
};

enum class State { kRuns, kAtBarrier, kAtWarp, kDone };

struct Fiber {
    static constexpr std::size_t kStack = 32 * kPage;
    ucontext_t context{};
    unsigned char* stack = static_cast<unsigned char*>(pages(kStack));
    State state = State::kDone;
    unsigned number = 0;
    std::vector<Copy> open;                 // copies of the group that is not closed
    std::deque<std::vector<Copy>> pending;  // closed groups
    std::uint32_t words[2][8] = {};         // what it shows to its warp, in turns
    int turn = 0;

    Fiber() { mprotect(stack, kPage, PROT_NONE); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber() { munmap(stack, kStack); }
    void begin(unsigned thread);
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    ucontext_t scheduler{};
    Fiber* running = nullptr;
    const std::function<void()>* body = nullptr;
    unsigned char* shared = nullptr;
    std::size_t shared_size = 0;
    std::mt19937 order{0};
};

inline Machine machine;

inline void enter() {
    (*machine.body)();
    machine.running->state = State::kDone;
    swapcontext(&machine.running->context, &machine.scheduler);
}

inline void Fiber::begin(unsigned thread) {
    number = thread;
    state = State::kRuns;
    turn = 0;
    open.clear();
    pending.clear();
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
}

inline void wait(State state) {
    machine.running->state = state;
    swapcontext(&machine.running->context, &machine.scheduler);
}

// Lets the threads [begin, end) go on that all wait in `state`; whether they did.
inline bool release(std::size_t begin, std::size_t end, State state) {
    for (std::size_t t = begin; t < end; ++t) {
        if (machine.fibers[t]->state != state) return false;
    }
    for (std::size_t t = begin; t < end; ++t) machine.fibers[t]->state = State::kRuns;
    return true;
}

inline void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) machine.fibers[t]->begin(t);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (;;) {
        std::shuffle(order.begin(), order.end(), machine.order);
        for (const unsigned t : order) {
            Fiber& fiber = *machine.fibers[t];
            if (fiber.state != State::kRuns) continue;
            machine.running = &fiber;
            threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
            swapcontext(&machine.scheduler, &fiber.context);
        }
        bool released = false;
        for (unsigned t = 0; t < threads; t += 32) {
            released |= release(t, std::min(t + 32, threads), State::kAtWarp);
        }
        if (released || release(0, threads, State::kAtBarrier)) continue;
        for (unsigned t = 0; t < threads; ++t) {
            if (machine.fibers[t]->state != State::kDone) fail("threads wait for others that never come");
        }
        return;
    }
}

inline void run(dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& body) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads < 1 || threads > 1024 || grid.y > 65535 || grid.z > 65535) fail("a launch no GPU takes");
    if (shared > 227 * 1024) fail("more shared memory than a block can have");
    while (machine.fibers.size() < threads) machine.fibers.push_back(std::make_unique<Fiber>());
    blockDim = block;
    gridDim = grid;
    machine.body = &body;
    // The end of the shared memory is the end of the last page that may be touched, up to its alignment.
    const std::size_t room = (shared + kPage - 1) / kPage * kPage, used = (shared + 15) / 16 * 16;
    auto* memory = static_cast<unsigned char*>(pages(room + kPage));
    mprotect(memory + room, kPage, PROT_NONE);
    machine.shared = memory + room - used;
    machine.shared_size = shared;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                std::memset(memory, 0xff, room);
                run_block(threads);
                if (std::any_of(memory, machine.shared, [](unsigned char byte) { return byte != 0xff; })) {
                    fail("something was written before the shared memory");
                }
            }
        }
    }
    munmap(memory, room + kPage);
}

inline void aligned(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail("a misaligned access");
}

inline void inside_shared(const void* address, std::size_t bytes) {
    aligned(address, bytes);
    const auto* begin = static_cast<const unsigned char*>(address);
    if (begin < machine.shared || begin + bytes > machine.shared + machine.shared_size) {
        fail("an address outside of the shared memory");
    }
}

// Shows words to the warp; `read(lane)` returns those of another thread.
template <std::size_t kWords, typename Use>
auto exchange(const std::uint32_t (&shown)[kWords], const Use& use) {
    Fiber& self = *machine.running;
    const int turn = self.turn;
    // In turns: nobody shows words again before all have read the last.
    self.turn = 1 - turn;
    std::copy(std::begin(shown), std::end(shown), self.words[turn]);
    wait(State::kAtWarp);
    const unsigned first = self.number / 32 * 32;
    return use(self.number % 32, [&](unsigned lane) { return machine.fibers[first + lane]->words[turn]; });
}

inline float half_to_float(std::uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline std::uint16_t float_to_half(float value) {
    return std::bit_cast<std::uint16_t>(static_cast<_Float16>(value));
}
inline float bfloat_to_float(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
inline std::uint16_t float_to_bfloat(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace metaprune::emulated

inline void __syncthreads() { metaprune::emulated::wait(metaprune::emulated::State::kAtBarrier); }

inline void __syncwarp() { metaprune::emulated::wait(metaprune::emulated::State::kAtWarp); }

// Of 4-byte values, by the whole warp.
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return metaprune::emulated::exchange({std::bit_cast<std::uint32_t>(value)}, [&](unsigned, auto words) {
        return std::bit_cast<T>(words(static_cast<unsigned>(lane) % 32)[0]);
    });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value,
                       static_cast<int>(metaprune::emulated::machine.running->number % 32) ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
    const unsigned lane = metaprune::emulated::machine.running->number % 32;
    return __shfl_sync(mask, value, static_cast<int>(lane + lanes < 32 ? lane + lanes : lane));
}

namespace metaprune {

template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, void*,
                   Parameters... arguments) {
    emulated::run(grid, block, shared, [&] { kernel(arguments...); });
    return nullptr;
}

inline int thread_number() { return static_cast<int>(threadIdx.x); }

inline unsigned char* shared_memory() { return emulated::machine.shared; }

inline void copy_async(void* shared, const void* global, bool valid = true) {
    emulated::inside_shared(shared, 16);
    emulated::aligned(global, 16);
    emulated::machine.running->open.push_back({shared, global, 16, valid ? 16 : 0});
}

template <int kBytes>
void copy_async_part(void* shared, const void* global, int kept) {
    emulated::inside_shared(shared, kBytes);
    emulated::aligned(global, kBytes);
    if (kept < 0 || kept > kBytes) emulated::fail("a copy of a length no GPU takes");
    emulated::machine.running->open.push_back({shared, global, kBytes, kept});
}

inline void commit_copies() {
    emulated::Fiber& self = *emulated::machine.running;
    self.pending.push_back(std::move(self.open));
    self.open.clear();
}

template <int kPending>
void wait_for_copies() {
    auto& pending = emulated::machine.running->pending;
    for (; pending.size() > kPending; pending.pop_front()) {
        for (const emulated::Copy& copy : pending.front()) {
            const auto kept = static_cast<std::size_t>(copy.kept);
            std::memcpy(copy.to, copy.from, kept);
            std::memset(static_cast<unsigned char*>(copy.to) + kept, 0,
                        static_cast<std::size_t>(copy.bytes) - kept);
        }
    }
}

namespace emulated {

template <bool kTransposed>
void load_matrices(std::uint32_t (&words)[4], const void* row) {
    inside_shared(row, 16);
    const auto address = std::bit_cast<std::uint64_t>(row);
    exchange({static_cast<std::uint32_t>(address), static_cast<std::uint32_t>(address >> 32)},
             [&](unsigned lane, auto shown) {
                 const auto element = [&](unsigned matrix, unsigned r, unsigned c) -> std::uint32_t {
                     const std::uint32_t* halves = shown(8 * matrix + r);
                     const std::uint64_t where = halves[0] | std::uint64_t{halves[1]} << 32;
                     return std::bit_cast<const std::uint16_t*>(where)[c];
                 };
                 const unsigned g = lane / 4, t = lane % 4 * 2;
                 for (unsigned j = 0; j < 4; ++j) {
                     words[j] = kTransposed ? element(j, t, g) | element(j, t + 1, g) << 16
                                            : element(j, g, t) | element(j, g, t + 1) << 16;
                 }
             });
    // The words were read from shared memory: nobody may write there before all have.
    wait(State::kAtWarp);
}

}  // namespace emulated

inline void load_matrices(std::uint32_t (&words)[4], const void* row) {
    emulated::load_matrices<false>(words, row);
}
inline void load_matrices_transposed(std::uint32_t (&words)[4], const void* row) {
    emulated::load_matrices<true>(words, row);
}

inline float larger(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }
inline float smaller(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::min(a, b); }

template <typename T>
float2 unpack(std::uint32_t word) {
    const auto low = static_cast<std::uint16_t>(word), high = static_cast<std::uint16_t>(word >> 16);
    if constexpr (kIsBFloat16<T>) return {emulated::bfloat_to_float(low), emulated::bfloat_to_float(high)};
    return {emulated::half_to_float(low), emulated::half_to_float(high)};
}
template <typename T>
std::uint32_t pack(float low, float high) {
    const auto bits = kIsBFloat16<T> ? emulated::float_to_bfloat : emulated::float_to_half;
    return std::uint32_t{bits(low)} | std::uint32_t{bits(high)} << 16;
}

template <typename T>
std::uint32_t larger_pair(std::uint32_t a, std::uint32_t b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(larger(x.x, y.x), larger(x.y, y.y));
}
template <typename T>
std::uint32_t smaller_pair(std::uint32_t a, std::uint32_t b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(smaller(x.x, y.x), smaller(x.y, y.y));
}

template <typename T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    emulated::exchange({a[0], a[1], a[2], a[3], b[0], b[1]}, [&](unsigned lane, auto words) {
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (unsigned k = 0; k < 16; k += 2) {
                const unsigned pair = k % 8 / 2;
                const float2 of_a = unpack<T>(words(row % 8 * 4 + pair)[row / 8 + k / 8 * 2]);
                const float2 of_b = unpack<T>(words(column * 4 + pair)[4 + k / 8]);
                c[i] += of_a.x * of_b.x;
                c[i] += of_a.y * of_b.y;
            }
        }
    });
}

}  // namespace metaprune
