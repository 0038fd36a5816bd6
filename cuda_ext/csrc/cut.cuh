// Rows of logits cut to what lies between two bounds: pointers, sizes and the CUDA kernel.
#pragma once

#include "logits.cuh"

namespace whipstaff {

struct Cut {
  LogitStream logits;  // (num_rows, vocab), changed in place
  int64_t vocab;
  const float *low, *high;  // (num_rows,), or null

  WHIPSTAFF_HOST_DEVICE float low_of(int64_t row) const { return low ? low[row] : -INFINITY; }
  WHIPSTAFF_HOST_DEVICE float high_of(int64_t row) const { return high ? high[row] : INFINITY; }
};

#ifdef WHIPSTAFF_KERNELS

// Block r cuts row r.
template <class T>
__global__ void __launch_bounds__(THREADS) cut_kernel(const Cut work) {
  const int64_t row = blockIdx.x;
  const float low = work.low_of(row), high = work.high_of(row);
  T* logits = static_cast<T*>(const_cast<void*>(work.logits.data)) + row * work.logits.stride;
  for (int64_t i = threadIdx.x; i < work.vocab; i += THREADS) {
    const float logit = to_float(logits[i]);
    if (logit < low || logit > high) logits[i] = from_float<T>(-INFINITY);
  }
}

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
