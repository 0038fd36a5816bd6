// The diagonal edit of one batch as pointers and sizes, and the CUDA kernel that performs it.
#pragma once

#include "slots.cuh"

#ifdef __CUDACC__
#include "cuda.cuh"
#endif

namespace whipstaff {

struct DiagEdit {
  void* x;          // (num_tokens, hidden), rows `x_stride` elements apart
  void* residual;   // as x, or null
  const void* mul;  // (num_slots, num_scales), or null; num_scales divides hidden
  const void* add;  // (num_slots, hidden), or null
  Slots slots;
  int64_t hidden, num_scales;
  int64_t x_stride, residual_stride, mul_stride, add_stride;
  bool renorm;
};

#ifdef __CUDACC__

// N neighbouring columns of one token: h is the stream before the edit, y after it.
template <class X, class Table, int N>
__device__ void edit_pack(const DiagEdit& edit, int64_t token, int64_t row, int64_t column, float (&h)[N],
                          float (&y)[N]) {
  load(h, static_cast<const X*>(edit.x) + token * edit.x_stride + column);
  float operand[N];
  if (edit.residual) {
    load(operand, static_cast<const X*>(edit.residual) + token * edit.residual_stride + column);
    for (int i = 0; i < N; ++i) h[i] += operand[i];
  }
  for (int i = 0; i < N; ++i) y[i] = h[i];
  if (edit.mul) {
    const Table* mul = static_cast<const Table*>(edit.mul) + row * edit.mul_stride;
    if (edit.num_scales == edit.hidden) {
      load(operand, mul + column);
    } else {  // one scale per group; a pack never crosses a group's edge
      const float scale = to_float(mul[column / (edit.hidden / edit.num_scales)]);
      for (int i = 0; i < N; ++i) operand[i] = scale;
    }
    for (int i = 0; i < N; ++i) y[i] *= operand[i];
  }
  if (edit.add) {
    load(operand, static_cast<const Table*>(edit.add) + row * edit.add_stride + column);
    for (int i = 0; i < N; ++i) y[i] += operand[i];
  }
  const float gain = edit.slots.gain_of(token);
  if (gain != 1.0f)
    for (int i = 0; i < N; ++i) y[i] = h[i] + gain * (y[i] - h[i]);
}

// Block (t, c) edits token t's columns c * THREADS * N onwards, in steps of the whole grid's width.
template <class X, class Table, int N, bool RENORM>
__global__ void __launch_bounds__(THREADS) diag_edit_kernel(const DiagEdit edit) {
  const int64_t token = blockIdx.x;
  const int64_t row = edit.slots.row(token);
  if (row < 0) return;
  const int64_t first = (int64_t(blockIdx.y) * THREADS + threadIdx.x) * N, step = int64_t(gridDim.y) * THREADS * N;
  float h[N], y[N], ratio = 1.0f;
  if constexpr (RENORM) {  // one block holds the whole row
    float before = 0, after = 0;
    for (int64_t column = first; column < edit.hidden; column += step) {
      edit_pack<X, Table, N>(edit, token, row, column, h, y);
      for (int i = 0; i < N; ++i) before += h[i] * h[i], after += y[i] * y[i];
    }
    before = block_sum(before);
    after = block_sum(after);
    if (after > 0) ratio = sqrtf(before / after);
  }
  for (int64_t column = first; column < edit.hidden; column += step) {
    edit_pack<X, Table, N>(edit, token, row, column, h, y);
    if constexpr (RENORM)
      for (int i = 0; i < N; ++i) y[i] *= ratio;
    store(static_cast<X*>(edit.x) + token * edit.x_stride + column, y);
    if (edit.residual) {
      for (int i = 0; i < N; ++i) h[i] = 0.0f;
      store(static_cast<X*>(edit.residual) + token * edit.residual_stride + column, h);
    }
  }
}

#endif  // __CUDACC__

}  // namespace whipstaff
