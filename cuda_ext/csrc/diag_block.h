// A diagonal edit of some of one token's columns, on the CPU, in loops that vectorise.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu.h"

namespace whipstaff {

// What an absent line reads as, so that one loop serves both: h * 1 and h + -0 are h, bit for bit.
struct Neutral {
  float ones[BLOCK], negative_zeros[BLOCK];
  Neutral() {
    std::fill_n(ones, BLOCK, 1.0f);
    std::fill_n(negative_zeros, BLOCK, -0.0f);
  }
  static const Neutral& get() {
    static const Neutral values;
    return values;
  }
};

// A block of one token's columns with the operands of its edit.
template <class X>
struct DiagBlock {
  X* x;
  const X* residual;  // or null
  const float *mul, *add;
  float gain;
  int64_t size;

  // x <- the sum of x and residual, edited.
  void edit() const { residual ? edit<true>() : edit<false>(); }

  template <bool HAS_RESIDUAL>
  void edit() const {
    gain == 1.0f ? edit<HAS_RESIDUAL, false>() : edit<HAS_RESIDUAL, true>();
  }

  template <bool HAS_RESIDUAL, bool HAS_GAIN>
  void edit() const {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      float h = static_cast<float>(x[i]);
      if constexpr (HAS_RESIDUAL) h += static_cast<float>(residual[i]);
      float y = h * mul[i] + add[i];
      if constexpr (HAS_GAIN) y = h + gain * (y - h);
      x[i] = static_cast<X>(y);
    }
  }
};

}  // namespace whipstaff
