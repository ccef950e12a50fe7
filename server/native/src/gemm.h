// Products with weights that are packed once: C (M, N) = A (M, K) W^T, W (N, K).
//
// Packed layout: panels of 32 output columns; a panel is K / KP steps of 32 lanes, or twice as many of 16 where
// registers hold the sums of no more. A panel is what a thread reads from memory in one go, once per step for all tokens.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "lanes.h"

namespace lm {

constexpr int kPanel = 32;                                  // columns of a panel
constexpr int kBeside = kHasManyRegisters ? kPanel : kVec;  // columns whose lanes of one step lie side by side
constexpr int kTileRows = kHasManyRegisters ? 12 : 5;       // rows whose sums are kept in registers
constexpr int kDepthUnit = 32;                              // K is padded to whole tiles of the matrix unit

struct FreeDeleter {
    void operator()(void* memory) const { std::free(memory); }
};

// Zeroed memory on cache lines; much of it on huge pages, if the kernel gives them to who asks: a step reads weights from
// one end to the other, and would look up an address for every 4 KiB.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) { resize(count); }

    // Grow to `count` values; contents are lost (and zero) when it grows.
    void resize(int64_t count) {
        if (count <= size_) return;
        constexpr int64_t kHugePage = 2 << 20;
        const bool is_huge = count * static_cast<int64_t>(sizeof(T)) >= 4 * kHugePage;
        const int64_t unit = is_huge ? kHugePage : kCacheLine;
        size_ = 0;  // If there is no memory, the next step must not take the old size for true.
        const size_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), unit);
        memory_.reset(static_cast<T*>(std::aligned_alloc(unit, bytes)));
        if (!memory_) throw std::bad_alloc();
        if (is_huge) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
        std::memset(static_cast<void*>(memory_.get()), 0, bytes);
        size_ = count;
    }

    T* get() { return memory_.get(); }
    const T* get() const { return memory_.get(); }
    int64_t size() const { return size_; }
    explicit operator bool() const { return size_ > 0; }

  private:
    std::unique_ptr<T, FreeDeleter> memory_;
    int64_t size_ = 0;
};

// A packed weight matrix. `width` is the columns of a panel: 32, or 16 for the narrow A matrices of adapters.
template <class T>
struct Packed {
    int64_t num_columns = 0;   // N
    int64_t depth = 0;         // K, padding left out
    int64_t steps = 0;         // padded K / KP
    int width = kPanel;
    T* start = nullptr;
    Buffer<T> own;             // empty where a larger buffer holds several matrices

    // Its size, in values; `tail` steps of zeros follow the last panel, for readers that go beyond it.
    int64_t measure(int64_t n, int64_t k, int panel_width, int64_t depth_unit, int64_t tail = 0) {
        num_columns = n;
        depth = k;
        width = panel_width;
        steps = round_up(k, depth_unit) / Lane<T>::KP;
        return (round_up(n, width) * steps + tail * width) * Lane<T>::KP;
    }
    void allocate(int64_t n, int64_t k, int panel_width, int64_t depth_unit, int64_t tail = 0) {
        own.resize(measure(n, k, panel_width, depth_unit, tail));
        start = own.get();
    }

    int64_t num_panels() const { return (num_columns + width - 1) / width; }
    const T* panel(int64_t index) const { return start + index * width * steps * Lane<T>::KP; }
    int64_t beside() const { return std::min(width, kBeside); }
    int64_t step_bytes() const { return beside() * 4; }  // from the lanes of one step to those of the next
    T* at(int64_t column, int64_t k) const {
        constexpr int KP = Lane<T>::KP;
        const int64_t step = column / beside() * steps + k / KP;
        return start + (step * beside() + column % beside()) * KP + k % KP;
    }
    // The first lanes of a vector of columns, vectors counted from column 0; without a division, for small products.
    const char* lanes(int64_t vector) const {
        const int64_t column = vector * kVec, odd = beside() > kVec ? column % kPanel : 0;
        return reinterpret_cast<const char*>(start + ((column - odd) * steps + odd) * Lane<T>::KP);
    }

    // Columns [first, first + n) from row-major `weight` (n, depth), whose rows are `stride` values apart.
    template <class S>
    void fill(int64_t first, int64_t n, const S* weight, int64_t stride) {
        for (int64_t column = 0; column < n; ++column)
            for (int64_t k = 0; k < depth; ++k)
                from_float(to_float(weight[column * stride + k]), at(first + column, k));
    }

    float value(int64_t column, int64_t k) const { return to_float(*at(column, k)); }
};

// sums (MR, 16 NV) += one lane of each row, whose values `left` points at, times NV vectors of lanes.
template <class T, int MR, int NV>
inline __attribute__((always_inline)) void add_lanes(Vec (&sums)[MR][NV], const Left<T>* const (&left)[MR],
                                                     const IntVec (&right)[NV]) {
    if constexpr (kWidens<T>) {
        // One value of the lanes after the other: registers do not hold both.
        const auto add = [&](int value, auto values_of) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                const Vec w = values_of(right[v]);
#pragma GCC unroll 12
                for (int m = 0; m < MR; ++m) sums[m][v] = multiply_add(all(left[m][value]), w, sums[m][v]);
            }
        };
        add(0, [](IntVec lanes) { return low_halves(lanes); });
        add(1, [](IntVec lanes) { return high_halves(lanes); });
    } else {
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sums[m][v] = Lane<T>::multiply_add(sums[m][v], left[m], right[v]);
        }
    }
}

// C (MR, 16 NV) (+)= A (MR, K) times NV columns of vectors; vector v of step k lies at right[v] + k * step_bytes.
template <class T, int MR, int NV>
inline __attribute__((always_inline)) void multiply_tile(const Left<T>* a, int64_t lda, const char* const* right,
                                                         int64_t step_bytes, int64_t steps, float* c, int64_t ldc,
                                                         bool accumulate) {
    Vec sums[MR][NV];
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) sums[m][v] = accumulate ? load(c + m * ldc + v * kVec) : zeros();
    const char* columns[NV];
    for (int v = 0; v < NV; ++v) columns[v] = right[v];
    for (int64_t k = 0; k < steps; ++k) {
        const Left<T>* left[MR];
        for (int m = 0; m < MR; ++m) left[m] = a + m * lda + k * Lane<T>::KP;
        IntVec w[NV];
        for (int v = 0; v < NV; ++v) {
            w[v] = load_lanes(columns[v] + k * step_bytes);
            _mm_prefetch(columns[v] + k * step_bytes + 2048, _MM_HINT_T0);
        }
        add_lanes<T, MR, NV>(sums, left, w);
    }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) store(c + m * ldc + v * kVec, sums[m][v]);
}

template <class T, int NV>
void multiply_rows(int64_t rows, const Left<T>* a, int64_t lda, const char* const* right, int64_t step_bytes,
                   int64_t steps, float* c, int64_t ldc, bool accumulate) {
#define LM_ROWS(MR)                                                                              \
    case MR:                                                                                     \
        if constexpr (MR <= kTileRows && MR * NV <= kSums)                                       \
            multiply_tile<T, MR, NV>(a, lda, right, step_bytes, steps, c, ldc, accumulate);      \
        break;
    switch (rows) {
        LM_ROWS(1) LM_ROWS(2) LM_ROWS(3) LM_ROWS(4) LM_ROWS(5) LM_ROWS(6)
        LM_ROWS(7) LM_ROWS(8) LM_ROWS(9) LM_ROWS(10) LM_ROWS(11) LM_ROWS(12)
    }
#undef LM_ROWS
}

// Vectors of columns whose sums for so many rows are kept in registers, a power of two. Few rows leave registers free:
// take several panels at once, so that enough sums are under way.
constexpr int64_t vectors_at_once(int64_t rows) {
    if (kHasManyRegisters) return rows <= 2 ? 8 : rows <= 6 ? 4 : 2;
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}
constexpr bool all_tiles_fit() {  // `multiply_rows` leaves out the others
    for (int rows = 1; rows <= kTileRows; ++rows)
        if (rows * vectors_at_once(rows) > kSums) return false;
    return kTileRows * vectors_at_once(kTileRows + 1) <= kSums;
}
static_assert(all_tiles_fit());

// C (rows, 16 vectors) (+)= A times columns of vectors, for up to kTileRows rows and 1, 2, 4 or 8 vectors.
template <class T>
void multiply_block(int64_t vectors, int64_t rows, const Left<T>* a, int64_t lda, const char* const* right,
                    int64_t step_bytes, int64_t steps, float* c, int64_t ldc, bool accumulate) {
    switch (vectors) {
        case 1: multiply_rows<T, 1>(rows, a, lda, right, step_bytes, steps, c, ldc, accumulate); break;
        case 2: multiply_rows<T, 2>(rows, a, lda, right, step_bytes, steps, c, ldc, accumulate); break;
        case 4: multiply_rows<T, 4>(rows, a, lda, right, step_bytes, steps, c, ldc, accumulate); break;
        default: multiply_rows<T, 8>(rows, a, lda, right, step_bytes, steps, c, ldc, accumulate); break;
    }
}

// C (rows, width * count) (+)= A times `count` neighbouring panels from `first`; ldc counts float32 values.
template <class T>
void multiply_panels(const Left<T>* a, int64_t lda, int64_t rows, const Packed<T>& weight, int64_t first, int64_t count,
                     float* c, int64_t ldc, bool accumulate = false) {
    const int64_t vectors = weight.width / kVec, total = count * vectors;
    const int64_t tiles = std::max<int64_t>(1, (rows + kTileRows - 1) / kTileRows);
    const int64_t at_once = (rows + tiles - 1) / tiles;  // of one height
    const char* right[8];
    // Rows of float32 are the larger side: a tile of them stays in the first-level cache, else 16 columns do.
    const int64_t block = kWidens<T> ? at_once : rows;
    for (int64_t begin = 0, stop; begin < rows; begin = stop) {
        stop = std::min(begin + block, rows);
        for (int64_t done = 0, now; done < total; done += now) {
            now = std::min(total - done, vectors_at_once(stop - begin));
            while (now & (now - 1)) now &= now - 1;  // a power of two
            for (int64_t v = 0; v < now; ++v) right[v] = weight.lanes(first * vectors + done + v);
            for (int64_t row = begin; row < stop; row += at_once)
                multiply_block<T>(now, std::min(at_once, stop - row), a + row * lda, lda, right, weight.step_bytes(),
                                  weight.steps, c + row * ldc + done * kVec, ldc, accumulate);
        }
    }
}

}  // namespace lm
