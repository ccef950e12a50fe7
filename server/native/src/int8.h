// Products of 8-bit weights with rows rounded to 8 bits: C (M, N) = A (M, K) W^T in whole numbers, group by group.
//
// A group is 32 values along K with one scale, of a column of W as of a row of A. The products of a group are summed as
// integers, exactly, and the groups in float32, in order: a row's sums depend on nothing beside it. llama.cpp multiplies
// its Q8_0 weights in the same way.
#pragma once

#include "gemm.h"

namespace lm {

constexpr int kGroup = 32;
static_assert(kDepthUnit % kGroup == 0);

// A whole number from -127 to 127, stored without a sign: x86 multiplies unsigned bytes with signed ones.
struct Byte {
    static constexpr int kOffset = 128;
    uint8_t bits;
};
template <>
struct Lane<Byte> {
    static constexpr int KP = 4;
};
inline float to_float(int8_t x) { return x; }
inline float to_float(Byte x) { return static_cast<float>(x.bits - Byte::kOffset); }
inline void from_float(float x, Byte* out) { out->bits = static_cast<uint8_t>(static_cast<int>(x) + Byte::kOffset); }

// A weight matrix of the base model: in the model's dtype, or, where `scales` is set, in bytes.
template <class T>
struct Linear {
    Packed<T> plain;
    Packed<Byte> bytes;
    Bf16* scales = nullptr;  // by the columns that lie side by side, group, and column

    bool is_int8() const { return scales != nullptr; }
    int64_t num_panels() const { return is_int8() ? bytes.num_panels() : plain.num_panels(); }
    const T* panel(int64_t index) const { return is_int8() ? nullptr : plain.panel(index); }

    int64_t num_groups() const { return bytes.steps * Lane<Byte>::KP / kGroup; }
    Bf16* scale(int64_t column, int64_t group) const {
        return scales + (column / kBeside * num_groups() + group) * kBeside + column % kBeside;
    }
    // Columns [first, first + n): values (n, K) and scales (n, groups), both row-major.
    void fill_int8(int64_t first, int64_t n, const int8_t* values, const Bf16* of_groups) {
        bytes.fill(first, n, values, bytes.depth);
        const int64_t groups = (bytes.depth + kGroup - 1) / kGroup;
        for (int64_t column = 0; column < n; ++column)
            for (int64_t g = 0; g < groups; ++g) *scale(first + column, g) = of_groups[column * groups + g];
    }

    float value(int64_t column, int64_t k) const {
        if (!is_int8()) return plain.value(column, k);
        T nearest;
        from_float(bytes.value(column, k) * to_float(*scale(column, k / kGroup)), &nearest);
        return to_float(nearest);
    }
};

// Rows of A at 8 bits.
class Int8Rows {
  public:
    void resize(int64_t rows, int64_t depth) {
        depth_ = depth;
        values_.resize(rows * depth);
        scales_.resize(rows * depth / kGroup);
        offsets_.resize(rows * depth / kGroup);
    }

    // Round `depth` values, a multiple of kGroup and at most what rows were made for, each group to its greatest magnitude.
    template <class L>
    void store(int64_t row, const L* x, int64_t depth) {
        for (int64_t k = 0, group = row * depth_ / kGroup; k < depth; k += kGroup, ++group) {
            const Vec low = load16(x + k), high = load16(x + k + kVec);
            const float greatest = greatest_of(maximum(absolute(low), absolute(high)));
            const Vec inverse = all(greatest > kNothing ? 127.0f / greatest : 0.0f);
            const Vec whole_low = rounded(low * inverse), whole_high = rounded(high * inverse);
            store_bytes(values_.get() + row * depth_ + k, whole_low);
            store_bytes(values_.get() + row * depth_ + k + kVec, whole_high);
            const bool is_broken = bits_of(is_not_finite(low) | is_not_finite(high)) != 0;
            scales_.get()[group] = is_broken ? NAN : greatest / 127.0f;
            offsets_.get()[group] = is_broken ? 0 : -Byte::kOffset * static_cast<int32_t>(sum_of(whole_low + whole_high));
        }
    }

    const int8_t* values(int64_t row) const { return values_.get() + row * depth_; }
    const float* scales(int64_t row) const { return scales_.get() + row * depth_ / kGroup; }
    const int32_t* offsets(int64_t row) const { return offsets_.get() + row * depth_ / kGroup; }

  private:
    static constexpr float kNothing = 1e-30f;  // whose inverse would leave float32
    int64_t depth_ = 0;
    Buffer<int8_t> values_;
    Buffer<float> scales_;     // of groups
    Buffer<int32_t> offsets_;  // what the sums of a group begin with, since bytes of W are too large by Byte::kOffset
};

// Sums of so many vectors, in integers and in float32, are kept in registers: of that many rows where they are all, so
// that weights are read once, else of half as many and two vectors, which takes fewer loads.
constexpr int kInt8Sums = kHasManyRegisters ? 12 : 2;
constexpr int64_t int8_rows_at_once(int64_t rows) {
    if (rows <= kInt8Sums) return rows;
    const int64_t most = kHasManyRegisters ? kInt8Sums / 2 : kInt8Sums, tiles = (rows + most - 1) / most;
    return (rows + tiles - 1) / tiles;  // of one height
}
constexpr int int8_vectors_at_once(int64_t rows) {
    if (kHasManyRegisters) return rows == 1 ? 8 : rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
    return rows == 1 ? 2 : 1;
}

// C (MR, 16 NV) = A times NV columns of vectors; vector v has its lanes at right[v] and its scales at scales[v].
template <int MR, int NV>
inline __attribute__((always_inline)) void multiply_int8_tile(const Int8Rows& a, int64_t row, const char* const* right,
                                                              int64_t step_bytes, const Bf16* const* scales,
                                                              int64_t groups, float* c, int64_t ldc) {
    constexpr int KP = Lane<Byte>::KP, kSteps = kGroup / KP;
    const int8_t* left[MR];
    for (int m = 0; m < MR; ++m) left[m] = a.values(row + m);
    Vec sums[MR][NV];
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) sums[m][v] = zeros();
    for (int64_t group = 0; group < groups; ++group) {
        IntVec whole[MR][NV];
        for (int m = 0; m < MR; ++m)
            for (int v = 0; v < NV; ++v) whole[m][v] = all_ints(a.offsets(row + m)[group]);
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step) {
            const int64_t k = group * kSteps + step;
            IntVec w[NV];
            for (int v = 0; v < NV; ++v) {
                w[v] = load_lanes(right[v] + k * step_bytes);
                _mm_prefetch(right[v] + k * step_bytes + 2048, _MM_HINT_T0);
            }
#pragma GCC unroll 12
            for (int m = 0; m < MR; ++m) {
                int32_t four;
                std::memcpy(&four, left[m] + k * KP, sizeof four);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) whole[m][v] = add_byte_products(whole[m][v], w[v], all_ints(four));
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const Vec scale = load16(scales[v] + group * kBeside);
#pragma GCC unroll 12
            for (int m = 0; m < MR; ++m)
                sums[m][v] = multiply_add(to_floats(whole[m][v]) * all(a.scales(row + m)[group]), scale, sums[m][v]);
        }
    }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) store(c + m * ldc + v * kVec, sums[m][v]);
}

template <int NV>
void multiply_int8_rows(int64_t rows, const Int8Rows& a, int64_t row, const char* const* right, int64_t step_bytes,
                        const Bf16* const* scales, int64_t groups, float* c, int64_t ldc) {
#define LM_ROWS(MR)                                                                        \
    case MR:                                                                               \
        if constexpr (MR * NV <= kInt8Sums)                                                \
            multiply_int8_tile<MR, NV>(a, row, right, step_bytes, scales, groups, c, ldc); \
        break;
    switch (rows) {
        LM_ROWS(1) LM_ROWS(2) LM_ROWS(3) LM_ROWS(4) LM_ROWS(5) LM_ROWS(6)
        LM_ROWS(7) LM_ROWS(8) LM_ROWS(9) LM_ROWS(10) LM_ROWS(11) LM_ROWS(12)
    }
#undef LM_ROWS
}

// C (rows, 32 count) = rows of A from `begin` on times `count` neighbouring panels from `first`.
template <class T>
void multiply_int8(const Int8Rows& a, int64_t begin, int64_t rows, const Linear<T>& weight, int64_t first, int64_t count,
                   float* c, int64_t ldc) {
    constexpr int64_t kVectors = kPanel / kVec;
    const int64_t at_once = int8_rows_at_once(rows), total = count * kVectors;
    const int64_t groups = weight.num_groups(), step_bytes = weight.bytes.step_bytes();
    const char* right[8];
    const Bf16* scales[8];
    for (int64_t done = 0, now; done < total; done += now) {
        now = std::min<int64_t>(total - done, int8_vectors_at_once(at_once));
        while (now & (now - 1)) now &= now - 1;  // a power of two
        for (int64_t v = 0; v < now; ++v) {
            const int64_t vector = first * kVectors + done + v;
            right[v] = weight.bytes.lanes(vector);
            scales[v] = weight.scale(vector * kVec, 0);
        }
        for (int64_t row = 0; row < rows; row += at_once) {
            const int64_t height = std::min(at_once, rows - row);
            float* out = c + row * ldc + done * kVec;
            switch (now) {
                case 1: multiply_int8_rows<1>(height, a, begin + row, right, step_bytes, scales, groups, out, ldc); break;
                case 2: multiply_int8_rows<2>(height, a, begin + row, right, step_bytes, scales, groups, out, ldc); break;
                case 4: multiply_int8_rows<4>(height, a, begin + row, right, step_bytes, scales, groups, out, ldc); break;
                default: multiply_int8_rows<8>(height, a, begin + row, right, step_bytes, scales, groups, out, ldc);
            }
        }
    }
}

}  // namespace lm
