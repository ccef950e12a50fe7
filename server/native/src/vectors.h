// Vectors of 16 float32 or int32 values, and what the kernels do with them: one register with AVX-512, two with AVX2.
//
// Both files offer the same names; where they say nothing else, a function treats each of the 16 places alone and
// rounds as the other file's does.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace lm {

constexpr int kVec = 16;  // values of a vector
#ifdef __AVX512F__
constexpr bool kHasManyRegisters = true;
#else
constexpr bool kHasManyRegisters = false;
#endif
constexpr int kSums = kHasManyRegisters ? 24 : 5;  // vectors of sums that registers hold beside the operands

}  // namespace lm

#ifdef __AVX512F__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif
