#include "buffers.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace metaprune {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21, kSmallest = std::size_t{1} << 20;

struct Block {
    void* memory;
    std::size_t bytes;
};

class Pool {
  public:
    Block take(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        // The smallest block that is not more than twice too large.
        std::size_t best = free_.size();
        for (std::size_t i = 0; i < free_.size(); ++i) {
            const bool fits = free_[i].bytes >= bytes && free_[i].bytes / 2 <= bytes;
            if (fits && (best == free_.size() || free_[i].bytes < free_[best].bytes)) best = i;
        }
        Block block{};
        if (best < free_.size()) {
            block = free_[best];
            free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
            kept_ -= block.bytes;
        } else {
            block.bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
            shrink(block.bytes);
            block.memory = allocate(block.bytes);
            if (block.memory == nullptr) {
                release(0);
                block.memory = allocate(block.bytes);
            }
            STD_TORCH_CHECK(block.memory != nullptr, "can't allocate memory: ", bytes, " bytes");
        }
        alive_ += block.bytes;
        if (alive_ > peak_) peak_ = alive_;
        return block;
    }

    void give_back(Block block) {
        const std::lock_guard lock(mutex_);
        alive_ -= block.bytes;
        kept_ += block.bytes;
        free_.push_back(block);
        shrink(0);
    }

  private:
    // Blocks come from the system itself: the C allocator would cut them up for smaller ones.
    static void* allocate(std::size_t bytes) {
#if defined(__linux__)
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        static_cast<void>(madvise(memory, bytes, MADV_HUGEPAGE));
        return memory;
#else
        return std::aligned_alloc(kHugePage, bytes);
#endif
    }

    static void deallocate(Block block) {
#if defined(__linux__)
        static_cast<void>(munmap(block.memory, block.bytes));
#else
        std::free(block.memory);
#endif
    }

    // Frees the blocks that were not used for longest until so many bytes more do not exceed twice the peak.
    void shrink(std::size_t more) {
        const std::size_t limit = alive_ + more > 2 * peak_ ? 0 : 2 * peak_ - alive_ - more;
        release(limit);
    }

    void release(std::size_t limit) {
        std::size_t oldest = 0;
        for (; kept_ > limit; ++oldest) {
            deallocate(free_[oldest]);
            kept_ -= free_[oldest].bytes;
        }
        free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(oldest));
    }

    std::mutex mutex_;
    std::vector<Block> free_;
    std::size_t alive_ = 0, kept_ = 0, peak_ = 0;
};

// Never destroyed: a tensor may outlive every other object of the process.
Pool& pool() {
    static Pool& instance = *new Pool;
    return instance;
}

}  // namespace

Tensor new_buffer(const Tensor& like, std::initializer_list<std::int64_t> shape) {
    std::size_t bytes = like.element_size();
    for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
#if defined(METAPRUNE_SANITIZE)
    // Nothing guards the ends of a block. What nobody writes stays NaN.
    const Tensor guarded = torch::stable::new_empty(like, shape);
    std::memset(guarded.mutable_data_ptr(), 0xff, bytes);
    return guarded;
#endif
    if (bytes < kSmallest) return torch::stable::new_empty(like, shape);
    std::vector<std::int64_t> strides(shape.size(), 1);
    for (std::size_t axis = shape.size() - 1; axis > 0; --axis) {
        strides[axis - 1] = strides[axis] * shape.begin()[axis];
    }
    const Block block = pool().take(bytes);
    return torch::stable::from_blob(block.memory, shape, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    like.scalar_type(), [block](void*) { pool().give_back(block); });
}

}  // namespace metaprune
