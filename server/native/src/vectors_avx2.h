// `vectors.h` with AVX2: a vector is a pair of registers, and a mask another, all ones in a place that is set.
#pragma once

namespace lm {

struct Vec {
    __m256 low, high;
};
struct IntVec {
    __m256i low, high;
};
struct Mask {
    __m256 low, high;
};

inline Vec zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline IntVec all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Vec load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline IntVec load_lanes(const void* x) {
    const __m256i* from = static_cast<const __m256i*>(x);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline void store(float* out, Vec x) {
    _mm256_storeu_ps(out, x.low);
    _mm256_storeu_ps(out + 8, x.high);
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline Vec multiply_add(Vec a, Vec b, Vec c) {  // a * b + c, rounded once
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec multiply_subtract(Vec a, Vec b, Vec c) {  // a * b - c
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Vec maximum(Vec a, Vec b) {  // b where either is not a number
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Vec absolute(Vec x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Vec rounded(Vec x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}

// Over all places, halves first.
inline float sum_of(Vec x) {
    const __m256 eight = _mm256_add_ps(x.high, x.low);
    const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_movehdup_ps(two));
}
inline float greatest_of(Vec x) {
    const __m256 eight = _mm256_max_ps(x.high, x.low);
    const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Vec as_floats(IntVec x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Vec to_floats(IntVec x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

// Each place of `sum` plus the products of the four bytes there, those of `x` without a sign and those of `y` with one.
inline IntVec add_byte_products(IntVec sum, IntVec x, IntVec y) {
    const auto add = [](__m256i half, __m256i a, __m256i b) {
        const __m256i even_a = _mm256_and_si256(a, _mm256_set1_epi16(0xff)), odd_a = _mm256_srli_epi16(a, 8);
        const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd_b = _mm256_srai_epi16(b, 8);
        half = _mm256_add_epi32(half, _mm256_madd_epi16(even_a, even_b));
        return _mm256_add_epi32(half, _mm256_madd_epi16(odd_a, odd_b));
    };
    return {add(sum.low, x.low, y.low), add(sum.high, x.high, y.high)};
}
// The nearest whole numbers of 16 values from -127 to 127.
inline void store_bytes(int8_t* out, Vec x) {
    // Packing takes turns between the 128-bit halves of its operands.
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
    words = _mm256_permute4x64_epi64(words, 0b11011000);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
}

// The lower and the upper half of every place as the upper half of a float32: the values of a pair of bfloat16.
inline Vec low_halves(IntVec x) { return as_floats({_mm256_slli_epi32(x.low, 16), _mm256_slli_epi32(x.high, 16)}); }
inline Vec high_halves(IntVec x) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return as_floats({_mm256_and_si256(x.low, upper), _mm256_and_si256(x.high, upper)});
}

inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }

inline Mask lanes_below(int64_t count) {
    const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(count < kVec ? count : kVec));
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, low)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, high))};
}
template <int kHow>
inline Mask compare(Vec a, Vec b) {
    return {_mm256_cmp_ps(a.low, b.low, kHow), _mm256_cmp_ps(a.high, b.high, kHow)};
}
inline Mask is_less(Vec a, Vec b) { return compare<_CMP_LT_OQ>(a, b); }
inline Mask is_not_less(Vec a, Vec b) { return compare<_CMP_NLT_UQ>(a, b); }  // also if not a number
inline Mask is_greater(Vec a, Vec b) { return compare<_CMP_GT_OQ>(a, b); }
inline Mask is_at_least(Vec a, Vec b) { return compare<_CMP_GE_OQ>(a, b); }
inline Mask is_equal(Vec a, Vec b) { return compare<_CMP_EQ_OQ>(a, b); }
inline Mask is_nan(Vec x) { return compare<_CMP_UNORD_Q>(x, x); }
inline Mask is_not_finite(Vec x) { return compare<_CMP_UNORD_Q>(x - x, zeros()); }
inline uint32_t bits_of(Mask mask) {  // place 0 first
    return static_cast<uint32_t>(_mm256_movemask_ps(mask.low) | _mm256_movemask_ps(mask.high) << 8);
}

inline Vec select(Mask mask, Vec where_set, Vec elsewhere) {
    return {_mm256_blendv_ps(elsewhere.low, where_set.low, mask.low),
            _mm256_blendv_ps(elsewhere.high, where_set.high, mask.high)};
}

// Memory is touched in places of the mask only.
inline IntVec load_some(Mask mask, const int32_t* x) {
    return {_mm256_maskload_epi32(x, _mm256_castps_si256(mask.low)),
            _mm256_maskload_epi32(x + 8, _mm256_castps_si256(mask.high))};
}
inline Vec load_some(Mask mask, const float* x, Vec elsewhere) {
    const Vec some = {_mm256_maskload_ps(x, _mm256_castps_si256(mask.low)),
                      _mm256_maskload_ps(x + 8, _mm256_castps_si256(mask.high))};
    return select(mask, some, elsewhere);
}
inline void store_some(float* out, Mask mask, Vec x) {
    _mm256_maskstore_ps(out, _mm256_castps_si256(mask.low), x.low);
    _mm256_maskstore_ps(out + 8, _mm256_castps_si256(mask.high), x.high);
}

// table[index] in places of the mask, 0 elsewhere.
inline Vec gather(Mask mask, const float* table, IntVec index) {
    return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, index.low, mask.low, 4),
            _mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, index.high, mask.high, 4)};
}
inline IntVec gather(Mask mask, const int32_t* table, IntVec index) {
    const __m256i zero = _mm256_setzero_si256();
    return {_mm256_mask_i32gather_epi32(zero, table, index.low, _mm256_castps_si256(mask.low), 4),
            _mm256_mask_i32gather_epi32(zero, table, index.high, _mm256_castps_si256(mask.high), 4)};
}

// x times 2 to the n, whole from -126 to 127, in places of the mask, 0 elsewhere; the result must be a normal number.
inline Vec scaled(Mask mask, Vec x, Vec n) {
    const auto power = [](__m256 exponent) {
        const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    return {_mm256_and_ps(_mm256_mul_ps(x.low, power(n.low)), mask.low),
            _mm256_and_ps(_mm256_mul_ps(x.high, power(n.high)), mask.high)};
}

// The nearest bfloat16, ties to even, as float32; what is not a number stays so.
inline Vec narrowed(Vec x) {
    const auto nearest = [](__m256 value) {
        const __m256i wide = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(wide, odd), _mm256_set1_epi32(0x7fff));
        const __m256i quiet = _mm256_or_si256(wide, _mm256_set1_epi32(0x400000));
        return _mm256_blendv_epi8(sum, quiet, _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
    };
    return high_halves({nearest(x.low), nearest(x.high)});
}

// 16 bfloat16 as float32, and back, rounded as `narrowed` does.
inline Vec load_narrow(const uint16_t* x) {
    const auto wide = [](const uint16_t* from) {
        return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
    };
    return as_floats({wide(x), wide(x + 8)});
}
inline void store_narrow(uint16_t* out, Vec x) {
    const auto upper_bits = [](__m256 value) { return _mm256_srli_epi32(_mm256_castps_si256(value), 16); };
    const Vec nearest = narrowed(x);
    // Packing takes turns between the 128-bit halves of its operands.
    const __m256i mixed = _mm256_packus_epi32(upper_bits(nearest.low), upper_bits(nearest.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(mixed, 0b11011000));
}

// Write 16 values of two bytes into one half of each of 16 places; the other halves may be another thread's.
inline void store_halves(void* out, bool is_upper, const uint16_t* x) {
    uint16_t* half = static_cast<uint16_t*>(out) + is_upper;
    for (int i = 0; i < kVec; ++i) half[2 * i] = x[i];
}

}  // namespace lm
