// Vectors of 16 "lanes" of 4 bytes: the unit that every kernel here counts in.
//
// A lane holds KP consecutive values along the summed dimension: two bfloat16 or one float32. Weights, keys and values
// are stored as rows of lanes, so one inner loop serves both types: broadcast a lane of the left side, multiply it with
// 16 lanes of the right side, add into 16 float32 sums. Every sum runs over its lanes one after another in a fixed
// order, whatever else is computed beside it; that is why a token's numbers never depend on its batch.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lm {

constexpr int kVec = 16;                 // lanes of one vector register
constexpr int kCacheLine = 64;           // bytes
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

inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const Bf16* x) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void store16(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
inline void store16(Bf16* out, __m512 x) {
#ifdef __AVX512BF16__
    // Rounds as `from_float` does, but for subnormal numbers, which it takes for zero.
    const __m256bh narrow = _mm512_cvtneps_pbh(x);
    std::memcpy(static_cast<void*>(out), &narrow, sizeof narrow);
#else
    const __m512i wide = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(wide, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(wide, _mm512_set1_epi32(0x400000));
    const __m512i bits = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(bits));
#endif
}

// One lane of type T, its arithmetic, and how many values it holds.
template <class T>
struct Lane;

template <>
struct Lane<float> {
    static constexpr int KP = 1;
    static inline __m512 multiply_add(__m512 sum, const void* left, __m512i right) {
        float a;
        std::memcpy(&a, left, sizeof a);
        return _mm512_fmadd_ps(_mm512_set1_ps(a), _mm512_castsi512_ps(right), sum);
    }
};

template <>
struct Lane<Bf16> {
    static constexpr int KP = 2;
    static inline __m512 multiply_add(__m512 sum, const void* left, __m512i right) {
        int32_t a;
        std::memcpy(&a, left, sizeof a);
        const __m512i pair = _mm512_set1_epi32(a);
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)right);
#else
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), sum);
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, high)),
                               _mm512_castsi512_ps(_mm512_and_si512(right, high)), sum);
#endif
    }
};

inline bool is_finite(const float* x, int64_t n) {
    constexpr int kNanOrInfinite = 0x01 | 0x08 | 0x10 | 0x80;
    __mmask16 found = 0;
    int64_t k = 0;
    for (; k + kVec <= n; k += kVec) found |= _mm512_fpclass_ps_mask(load16(x + k), kNanOrInfinite);
    for (; k < n; ++k) found |= std::isfinite(x[k]) ? 0 : 1;
    return found == 0;
}

constexpr float kLog2E = 1.44269504088896341f;

// 2 to the x for x <= 0; 0 below -126, and not a number stays so. `c`: coefficients of a polynomial over [-0.5, 0.5],
// highest first. Masked, not clamped: a result too small for a normal number costs the CPU more than a hundred cycles.
template <int N>
inline __m512 power_of_two(const float (&c)[N], __m512 x) {
    const __mmask16 is_some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < N; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
    return _mm512_maskz_scalef_ps(is_some, p, n);
}

// Interpolated at Chebyshev's nodes; to 1e-7, and to 4e-6 relative.
inline constexpr float kExp2[] = {1.546973198e-04f, 1.340043217e-03f, 9.618025603e-03f, 5.550327214e-02f,
                                  2.402265121e-01f, 6.931472067e-01f, 1.0f};
inline constexpr float kCoarseExp2[] = {9.666368515e-03f, 5.592197584e-02f, 2.402234904e-01f, 6.931210452e-01f, 1.0f};

inline __m512 exp2_16(__m512 x) { return power_of_two(kExp2, x); }

// For weights that are rounded to T: bfloat16 is off by up to 4e-3 anyway.
template <class T>
inline __m512 weight_exp2_16(__m512 x) {
    if constexpr (sizeof(T) == sizeof(float))
        return exp2_16(x);
    else
        return power_of_two(kCoarseExp2, x);
}

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace lm
