#include "workspace.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace metaprune {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
};

}  // namespace

#if defined(METAPRUNE_SANITIZE)

// Memory of exactly this size, fresh for every call and full of NaN: whoever reads beyond its end, what an
// earlier call returned or what was not written yet is found out.
std::byte* workspace(std::size_t bytes) {
    thread_local std::unique_ptr<std::byte, Free> memory;
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, bytes) != 0) throw std::bad_alloc();
    memory.reset(static_cast<std::byte*>(fresh));
    std::memset(fresh, 0xff, bytes);
    return memory.get();
}

#else

std::byte* workspace(std::size_t bytes) {
    thread_local std::unique_ptr<std::byte, Free> memory;
    thread_local std::size_t capacity = 0;
    if (bytes > capacity) {
        const std::size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        memory.reset();
        capacity = 0;
        memory.reset(static_cast<std::byte*>(std::aligned_alloc(kHugePage, size)));
        if (memory == nullptr) throw std::bad_alloc();
        capacity = size;
#if defined(__linux__)
        // Fewer address translations where the kernel agrees; otherwise nothing changes.
        static_cast<void>(madvise(memory.get(), size, MADV_HUGEPAGE));
#endif
    }
    return memory.get();
}

#endif

}  // namespace metaprune
