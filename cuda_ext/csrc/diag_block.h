// A diagonal edit of some of one token's columns, on the CPU, in loops that vectorise.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu.h"

namespace whipstaff {

// What an absent table reads as, so that one loop serves both: h * 1 and h + -0 are h, bit for bit.
template <class T>
struct Neutral {
  T ones[BLOCK], negative_zeros[BLOCK];
  Neutral() {
    std::fill_n(ones, BLOCK, T(1.0f));
    std::fill_n(negative_zeros, BLOCK, T(-0.0f));
  }
  static const Neutral& get() {
    static const Neutral values;
    return values;
  }
};

// A block of one token's columns with the operands of its edit.
template <class X, class Table>
struct Block {
  const X *x, *residual;
  const Table *mul, *add;
  float gain;
  int64_t begin, size;

  // use(i, h, y): the stream before and after the edit.
  template <bool HAS_RESIDUAL, bool HAS_GAIN, class Use>
  void for_columns(const Use& use) const {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      float h = static_cast<float>(x[i]);
      if constexpr (HAS_RESIDUAL) h += static_cast<float>(residual[i]);
      float y = h * static_cast<float>(mul[i]) + static_cast<float>(add[i]);
      if constexpr (HAS_GAIN) y = gain == 1.0f ? y : h + gain * (y - h);
      use(i, h, y);
    }
  }

  template <bool HAS_GAIN, class Use>
  void for_columns(const Use& use) const {
    residual ? for_columns<true, HAS_GAIN>(use) : for_columns<false, HAS_GAIN>(use);
  }
};

}  // namespace whipstaff
