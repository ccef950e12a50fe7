// Vectors of 16 "lanes" of 4 bytes: the unit that every kernel here counts in.
//
// A lane holds KP consecutive values along the summed dimension: two bfloat16 or one float32. Weights, keys and values
// are stored as rows of lanes, so one inner loop serves both types: broadcast a lane of the left side, multiply it with
// 16 lanes of the right side, add into 16 float32 sums. Every sum runs over its lanes one after another in a fixed
// order, whatever else is computed beside it; that is why a token's numbers never depend on its batch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace lm {

constexpr int kCacheLine = 64;  // bytes
constexpr float kMinusInf = -INFINITY;

struct Bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
    // Round to nearest, ties to even; NaN stays NaN.
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    if ((wide & 0x7fffffffu) > 0x7f800000u) {
        out->bits = static_cast<uint16_t>((wide >> 16) | 0x40u);
        return;
    }
    wide += 0x7fffu + ((wide >> 16) & 1u);
    out->bits = static_cast<uint16_t>(wide >> 16);
}

inline Vec load16(const float* x) { return load(x); }
inline Vec load16(const Bf16* x) { return load_narrow(&x->bits); }
inline void store16(float* out, Vec x) { store(out, x); }
inline void store16(Bf16* out, Vec x) { store_narrow(&out->bits, x); }

// One lane of type T, its arithmetic, and how many values it holds.
template <class T>
struct Lane;

template <>
struct Lane<float> {
    static constexpr int KP = 1;
    static inline Vec multiply_add(Vec sum, const void* left, IntVec right) {
        float a;
        std::memcpy(&a, left, sizeof a);
        return lm::multiply_add(all(a), as_floats(right), sum);
    }
};

template <>
struct Lane<Bf16> {
    static constexpr int KP = 2;
    static inline Vec multiply_add(Vec sum, const void* left, IntVec right) {
        int32_t a;
        std::memcpy(&a, left, sizeof a);
        const IntVec pair = all_ints(a);
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)right);
#else
        sum = lm::multiply_add(low_halves(pair), low_halves(right), sum);
        return lm::multiply_add(high_halves(pair), high_halves(right), sum);
#endif
    }
};

// Whether the left sides of products are kept as float32, rounded to T all the same: with AVX2 taking each pair of
// bfloat16 apart again for every 16 columns costs a third of a product. The sums are the same ones. (With AVX-512 alone
// it is not done: the rows of a tile, and their pointers, are too many for the registers that gcc has left.)
template <class T>
constexpr bool kWidens = std::is_same_v<T, Bf16> && !kHasManyRegisters;
template <class T>
using Left = std::conditional_t<kWidens<T>, float, T>;

template <class T>
inline void store_left(Left<T>* out, Vec x) {
    if constexpr (kWidens<T>)
        store(out, narrowed(x));
    else
        store16(out, x);
}
template <class T>
inline void store_left(Left<T>* out, float x) {
    T nearest;
    from_float(x, &nearest);
    from_float(to_float(nearest), out);
}

inline bool is_finite(const float* x, int64_t n) {
    bool found = false;
    int64_t k = 0;
    for (; k + kVec <= n; k += kVec) found |= bits_of(is_not_finite(load(x + k))) != 0;
    for (; k < n; ++k) found |= !std::isfinite(x[k]);
    return !found;
}

constexpr float kLog2E = 1.44269504088896341f;

// 2 to the x for x <= 0; 0 below -126, and not a number stays so. `c`: coefficients of a polynomial over [-0.5, 0.5],
// highest first. Masked, not clamped: a result too small for a normal number costs the CPU more than a hundred cycles.
template <int N>
inline Vec power_of_two(const float (&c)[N], Vec x) {
    const Mask is_some = is_not_less(x, all(-126.0f));
    const Vec n = rounded(x), r = x - n;
    Vec p = all(c[0]);
    for (int i = 1; i < N; ++i) p = multiply_add(p, r, all(c[i]));
    return scaled(is_some, p, n);
}

// Interpolated at Chebyshev's nodes; to 1e-7, and to 4e-6 relative.
inline constexpr float kExp2[] = {1.546973198e-04f, 1.340043217e-03f, 9.618025603e-03f, 5.550327214e-02f,
                                  2.402265121e-01f, 6.931472067e-01f, 1.0f};
inline constexpr float kCoarseExp2[] = {9.666368515e-03f, 5.592197584e-02f, 2.402234904e-01f, 6.931210452e-01f, 1.0f};

inline Vec exp2_16(Vec x) { return power_of_two(kExp2, x); }

// For weights that are rounded to T: bfloat16 is off by up to 4e-3 anyway.
template <class T>
inline Vec weight_exp2_16(Vec x) {
    if constexpr (sizeof(T) == sizeof(float))
        return exp2_16(x);
    else
        return power_of_two(kCoarseExp2, x);
}

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace lm
