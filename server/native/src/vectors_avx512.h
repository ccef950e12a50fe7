// `vectors.h` with AVX-512: a vector is a register, a mask a bit per place. Vec has + - * / of its own.
#pragma once

namespace lm {

using Vec = __m512;
using IntVec = __m512i;
using Mask = __mmask16;

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline IntVec all_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline IntVec load_lanes(const void* x) { return _mm512_loadu_si512(x); }
inline void store(float* out, Vec x) { _mm512_storeu_ps(out, x); }

inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }       // a * b + c, rounded once
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }  // a * b - c
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is not a number
inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
inline Vec rounded(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Over all places, halves first.
inline float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }
inline float greatest_of(Vec x) { return _mm512_reduce_max_ps(x); }

inline Vec as_floats(IntVec x) { return _mm512_castsi512_ps(x); }
inline Vec to_floats(IntVec x) { return _mm512_cvtepi32_ps(x); }

// Each place of `sum` plus the products of the four bytes there, those of `x` without a sign and those of `y` with one.
inline IntVec add_byte_products(IntVec sum, IntVec x, IntVec y) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, x, y);
#else
    const __m512i even_x = _mm512_and_si512(x, _mm512_set1_epi16(0xff)), odd_x = _mm512_srli_epi16(x, 8);
    const __m512i even_y = _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8), odd_y = _mm512_srai_epi16(y, 8);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even_x, even_y));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(odd_x, odd_y));
#endif
}
// The nearest whole numbers of 16 values from -127 to 127.
inline void store_bytes(int8_t* out, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

// The lower and the upper half of every place as the upper half of a float32: the values of a pair of bfloat16.
inline Vec low_halves(IntVec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Vec high_halves(IntVec x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline Mask lanes_below(int64_t count) {
    const IntVec place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cmplt_epi32_mask(place, all_ints(static_cast<int32_t>(count < kVec ? count : kVec)));
}
inline Mask is_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // also if not a number
inline Mask is_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask is_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask is_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask is_nan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Mask is_not_finite(Vec x) {
    constexpr int kNanOrInfinite = 0x01 | 0x08 | 0x10 | 0x80;
    return _mm512_fpclass_ps_mask(x, kNanOrInfinite);
}
inline uint32_t bits_of(Mask mask) { return mask; }  // place 0 first

inline Vec select(Mask mask, Vec where_set, Vec elsewhere) { return _mm512_mask_mov_ps(elsewhere, mask, where_set); }

// Memory is touched in places of the mask only.
inline Vec load_some(Mask mask, const float* x, Vec elsewhere) { return _mm512_mask_loadu_ps(elsewhere, mask, x); }
inline IntVec load_some(Mask mask, const int32_t* x) { return _mm512_maskz_loadu_epi32(mask, x); }
inline void store_some(float* out, Mask mask, Vec x) { _mm512_mask_storeu_ps(out, mask, x); }

// table[index] in places of the mask, 0 elsewhere.
inline Vec gather(Mask mask, const float* table, IntVec index) {
    return _mm512_mask_i32gather_ps(zeros(), mask, index, table, 4);
}
inline IntVec gather(Mask mask, const int32_t* table, IntVec index) {
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, index, table, 4);
}

// x times 2 to the n, whole from -126 to 127, in places of the mask, 0 elsewhere; the result must be a normal number.
inline Vec scaled(Mask mask, Vec x, Vec n) { return _mm512_maskz_scalef_ps(mask, x, n); }

// The nearest bfloat16, ties to even, as float32; what is not a number stays so.
inline Vec narrowed(Vec x) {
    const __m512i wide = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(wide, odd), _mm512_set1_epi32(0x7fff));
    const __m512i quiet = _mm512_or_si512(wide, _mm512_set1_epi32(0x400000));
    return high_halves(_mm512_mask_mov_epi32(nearest, is_nan(x), quiet));
}

// 16 bfloat16 as float32, and back, rounded as `narrowed` does.
inline Vec load_narrow(const uint16_t* x) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
inline void store_narrow(uint16_t* out, Vec x) {
#ifdef __AVX512BF16__
    // But for subnormal numbers, which it takes for zero.
    const __m256bh narrow = _mm512_cvtneps_pbh(x);
    std::memcpy(static_cast<void*>(out), &narrow, sizeof narrow);
#else
    const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(narrowed(x)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(bits));
#endif
}

// Write 16 values of two bytes into one half of each of 16 places; the other halves may be another thread's.
inline void store_halves(void* out, bool is_upper, const uint16_t* x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    _mm512_mask_storeu_epi16(out, is_upper ? 0xaaaaaaaau : 0x55555555u, is_upper ? _mm512_slli_epi32(wide, 16) : wide);
}

}  // namespace lm
