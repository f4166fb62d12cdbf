#include "buffers.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace metaprune {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21, kSmallest = std::size_t{1} << 20, kUnit = 1 << 16;

// Memory from the system, of which parts are in use.
struct Segment {
    std::byte* memory;
    std::size_t bytes;
    std::map<std::size_t, std::size_t> free;  // bytes by offset; neighbours are one range

    bool unused() const { return free.size() == 1 && free.begin()->second == bytes; }
};

struct Block {
    Segment* segment;
    std::size_t offset, bytes;

    std::byte* memory() const { return segment->memory + offset; }
};

class Pool {
  public:
    Block take(std::size_t size) {
        const std::lock_guard lock(mutex_);
        const std::size_t bytes = (size + kUnit - 1) / kUnit * kUnit;
        Block block = smallest_fit(bytes);
        if (block.segment == nullptr) block = {new_segment(bytes), 0, bytes};
        cut(block);
        alive_ += bytes;
        if (alive_ > peak_) peak_ = alive_;
        return block;
    }

    void give_back(Block block) {
        const std::lock_guard lock(mutex_);
        alive_ -= block.bytes;
        auto& free = block.segment->free;
        const auto range = free.emplace(block.offset, block.bytes).first;
        if (const auto next = std::next(range);
            next != free.end() && range->first + range->second == next->first) {
            range->second += next->second;
            free.erase(next);
        }
        if (range != free.begin()) {
            const auto previous = std::prev(range);
            if (previous->first + previous->second == range->first) {
                previous->second += range->second;
                free.erase(range);
            }
        }
        release_unused(kMostOfPeak * peak_);
    }

  private:
    static constexpr std::size_t kMostOfPeak = 2;

    Block smallest_fit(std::size_t bytes) {
        Block best{};
        std::size_t least = 0;
        for (Segment& segment : segments_) {
            for (const auto& [offset, length] : segment.free) {
                if (length < bytes || (best.segment != nullptr && length >= least)) continue;
                best = {&segment, offset, bytes};
                least = length;
            }
        }
        return best;
    }

    // Takes a block from the front of a free range.
    static void cut(Block block) {
        auto& free = block.segment->free;
        const auto range = free.find(block.offset);
        if (range->second > block.bytes)
            free.emplace(block.offset + block.bytes, range->second - block.bytes);
        free.erase(range);
    }

    Segment* new_segment(std::size_t bytes) {
        bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        // What is kept in pieces that are all too small would only add to this.
        const std::size_t limit = kMostOfPeak * std::max(peak_, alive_ + bytes);
        release_unused(limit > bytes ? limit - bytes : 0);
        std::byte* memory = allocate(bytes);
        if (memory == nullptr) {
            release_unused(0);
            memory = allocate(bytes);
        }
        STD_TORCH_CHECK(memory != nullptr, "can't allocate memory: ", bytes, " bytes");
        held_ += bytes;
        segments_.push_back({memory, bytes, {{0, bytes}}});
        return &segments_.back();
    }

    // Segments come from the system itself: the C allocator would cut them up for smaller things.
    static std::byte* allocate(std::size_t bytes) {
#if defined(__linux__)
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        static_cast<void>(madvise(memory, bytes, MADV_HUGEPAGE));
        return static_cast<std::byte*>(memory);
#else
        return static_cast<std::byte*>(std::aligned_alloc(kHugePage, bytes));
#endif
    }

    static void deallocate(const Segment& segment) {
#if defined(__linux__)
        static_cast<void>(munmap(segment.memory, segment.bytes));
#else
        std::free(segment.memory);
#endif
    }

    // Gives the smallest unused segments back to the system until no more than `limit` bytes are held.
    void release_unused(std::size_t limit) {
        while (held_ > limit) {
            auto smallest = segments_.end();
            for (auto segment = segments_.begin(); segment != segments_.end(); ++segment) {
                if (segment->unused() && (smallest == segments_.end() || segment->bytes < smallest->bytes))
                    smallest = segment;
            }
            if (smallest == segments_.end()) return;
            held_ -= smallest->bytes;
            deallocate(*smallest);
            segments_.erase(smallest);
        }
    }

    std::mutex mutex_;
    std::list<Segment> segments_;
    std::size_t alive_ = 0, held_ = 0, peak_ = 0;
};

// Never destroyed: a tensor may outlive every other object of the process.
Pool& pool() {
    static Pool& instance = *new Pool;
    return instance;
}

Tensor uninitialised(const Tensor& like, const std::vector<std::int64_t>& shape, ScalarType dtype,
                     std::size_t bytes) {
    for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
#if defined(METAPRUNE_SANITIZE)
    // Nothing guards the ends of a block. What nobody writes stays NaN.
    const Tensor guarded = torch::stable::new_empty(like, shape, dtype);
    std::memset(guarded.mutable_data_ptr(), 0xff, bytes);
    return guarded;
#endif
    if (bytes < kSmallest) return torch::stable::new_empty(like, shape, dtype);
    std::vector<std::int64_t> strides(shape.size(), 1);
    for (std::size_t axis = shape.size() - 1; axis > 0; --axis) {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    const Block block = pool().take(bytes);
    return torch::stable::from_blob(block.memory(), shape, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                    [block](void*) { pool().give_back(block); });
}

}  // namespace

Tensor new_buffer(const Tensor& like, const std::vector<std::int64_t>& shape) {
    return uninitialised(like, shape, like.scalar_type(), like.element_size());
}

Tensor new_floats(const Tensor& like, const std::vector<std::int64_t>& shape) {
    return uninitialised(like, shape, ScalarType::Float, sizeof(float));
}

}  // namespace metaprune

STABLE_TORCH_LIBRARY_FRAGMENT(metaprune, m) { m.def("new_buffer(Tensor like, int[] shape) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) { m.impl("new_buffer", TORCH_BOX(&metaprune::new_buffer)); }
