// The low-rank edit of one batch as pointers and sizes, and the CUDA kernels that perform it.
#pragma once

#include "phi.cuh"
#include "slots.cuh"

#ifdef __CUDACC__
#include "cuda.cuh"
#endif

namespace whipstaff {

constexpr int MAX_RANK = 64;

struct LowrankEdit {
  void* x;                // (num_tokens, hidden), rows `x_stride` elements apart
  const void* residual;   // as x, or null: read with x, not changed
  const void* read;       // V: (num_slots, rank, hidden)
  const void* write;      // U: (num_slots, rank, hidden)
  const float* bias;      // (num_slots, rank), or null
  const int32_t* phi;     // (num_slots, rank)
  const float* phi_args;  // (num_slots, rank, NUM_PHI_ARGS)
  Slots slots;
  int64_t hidden, rank;
  int64_t x_stride, residual_stride, read_stride[2], write_stride[2];

  WHIPSTAFF_HOST_DEVICE Phi phi_of(int64_t row, int64_t r) const { return static_cast<Phi>(phi[row * rank + r]); }
};

// What direction r adds along its writing vector.
WHIPSTAFF_HOST_DEVICE inline float apply_phi(const LowrankEdit& edit, int64_t row, int64_t r, const float* z) {
  const Phi phi = edit.phi_of(row, r);
  const float* arg = edit.phi_args + (row * edit.rank + first_of(phi, r)) * NUM_PHI_ARGS;
  return apply_phi(phi, arg, z, r, edit.rank, -INFINITY);
}

#ifdef __CUDACC__

constexpr int DIRECTIONS = THREADS / WARP;  // one warp reads one direction

// Block (t, c): what the directions c * DIRECTIONS onwards read from token t, one per warp; into z (num_tokens, rank).
template <class X, class Table, int N>
__global__ void __launch_bounds__(THREADS) read_kernel(const LowrankEdit edit, float* z) {
  const int64_t token = blockIdx.x, row = edit.slots.row(token);
  const int64_t r = int64_t(blockIdx.y) * DIRECTIONS + threadIdx.x / WARP;
  if (row < 0 || r >= edit.rank || edit.phi_of(row, r) == Phi::Off) return;
  const X* x = static_cast<const X*>(edit.x) + token * edit.x_stride;
  const X* residual = edit.residual ? static_cast<const X*>(edit.residual) + token * edit.residual_stride : nullptr;
  const Table* read = static_cast<const Table*>(edit.read) + row * edit.read_stride[0] + r * edit.read_stride[1];
  float sum = 0;
  for (int64_t column = threadIdx.x % WARP * N; column < edit.hidden; column += WARP * N) {
    float h[N], v[N];
    load(h, x + column);
    if (residual) {
      load(v, residual + column);
      for (int i = 0; i < N; ++i) h[i] += v[i];
    }
    load(v, read + column);
    for (int i = 0; i < N; ++i) sum += h[i] * v[i];
  }
  sum = warp_reduce(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x % WARP == 0) z[token * edit.rank + r] = sum + (edit.bias ? edit.bias[row * edit.rank + r] : 0.0f);
}

// Block (t, c) adds what the directions write to token t's columns c * THREADS * N onwards.
template <class X, class Table, int N>
__global__ void __launch_bounds__(THREADS) write_kernel(const LowrankEdit edit, const float* z) {
  const int64_t token = blockIdx.x, row = edit.slots.row(token);
  if (row < 0) return;
  __shared__ float delta[MAX_RANK];
  if (threadIdx.x < edit.rank) delta[threadIdx.x] = apply_phi(edit, row, threadIdx.x, z + token * edit.rank);
  __syncthreads();
  const int64_t column = (int64_t(blockIdx.y) * THREADS + threadIdx.x) * N;
  if (column >= edit.hidden) return;
  const Table* write = static_cast<const Table*>(edit.write) + row * edit.write_stride[0] + column;
  float sum[N] = {}, operand[N];
  for (int64_t r = 0; r < edit.rank; ++r) {
    if (delta[r] == 0.0f) continue;
    load(operand, write + r * edit.write_stride[1]);
    for (int i = 0; i < N; ++i) sum[i] += delta[r] * operand[i];
  }
  X* x = static_cast<X*>(edit.x) + token * edit.x_stride + column;
  load(operand, x);
  for (int i = 0; i < N; ++i) operand[i] += edit.slots.gain_of(token) * sum[i];
  store(x, operand);
}

#endif  // __CUDACC__

}  // namespace whipstaff
