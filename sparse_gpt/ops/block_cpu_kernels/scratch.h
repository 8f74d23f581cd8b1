// Memory that a call works in, and the pages it comes in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <sys/mman.h>

constexpr int64_t kHugePage = 2 << 20;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Fresh memory that is about to be written comes in pages of 2 MB, where the system has them.
static inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (!data || bytes < 4 * kHugePage) return;
    const uintptr_t first = reinterpret_cast<uintptr_t>(data), page = kHugePage;
    const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish
#endif
}

// Memory that a calling thread keeps between calls: fresh pages would cost more than packing does.
class Scratch {
public:
    ~Scratch() { std::free(data_); }

    float* floats(int64_t count) {
        if (count > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const size_t bytes = static_cast<size_t>(round_up(count * 4, kHugePage));
            if (posix_memalign(&data_, kHugePage, bytes)) throw std::bad_alloc();
            use_huge_pages(data_, bytes);
            size_ = count;
        }
        return static_cast<float*>(data_);
    }

private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};
