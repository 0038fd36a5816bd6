// Exponentials and sums of them over rows of logits, on the CPU, in loops that vectorise.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace whipstaff {

constexpr float LOG2_E = 1.44269504f;

// 2^x within two units in the last place for x <= 0; below -126 it is next to nothing, never a denormal.
inline float exp2_of_negative(float x) {
  x = x > -126.0f ? x : -126.0f;
  const float shifted = x + 12582912.0f;        // 1.5 * 2^23: the sum's low bits hold the rounded exponent
  const float r = x - (shifted - 12582912.0f);  // -0.5 .. 0.5
  float p = 1.535336188e-4f;
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  const int32_t scale = (std::bit_cast<int32_t>(shifted) << 23) + (127 << 23);
  return (p * r + 1.0f) * std::bit_cast<float>(scale);
}

inline float exp_of_negative(float x) { return exp2_of_negative(x * LOG2_E); }

inline float max_of(const float* block, int64_t size) {
  float best = -INFINITY;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < size; ++i) best = block[i] > best ? block[i] : best;
  return best;
}

// Sum of e^(factor * (x - max)).
inline float sum_of_exp(const float* block, int64_t size, float max, float factor) {
  const float scale = factor * LOG2_E;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += exp2_of_negative((block[i] - max) * scale);
  return sum;
}

struct ExpSums {
  float sum, weighted;  // of e^d, and of d e^d
};

// Of d = x - max; where d e^d is next to nothing d is bounded, so that -inf adds nothing.
inline ExpSums exp_sums(const float* block, int64_t size, float max) {
  float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < size; ++i) {
    const float gap = block[i] - max, d = gap > -87.0f ? gap : -87.0f, e = exp_of_negative(d);
    sum += e;
    weighted += d * e;
  }
  return {sum, weighted};
}

}  // namespace whipstaff
