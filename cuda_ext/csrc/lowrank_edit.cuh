// The low-rank edit of one batch as pointers and sizes, and the CUDA kernels that perform it.
#pragma once

#include "slots.cuh"

#include <cmath>

#ifdef __CUDACC__
#include "cuda.cuh"
#endif

namespace whipstaff {

constexpr int MAX_RANK = 64;
constexpr int NUM_PHI_ARGS = 4;

// What happens to one reading z of the stream, or to a pair of readings (z, w); a, b, c, d are the direction's
// arguments. The result is what is added along the direction's writing vector.
enum class Phi : int32_t {
  Off = 0,     // 0: the direction is padding
  Affine = 1,  // a z + b
  Set = 2,     // a - z
  Clamp = 3,   // min(max(z, a), b) - z
  Gated = 4,   // b z + c where z > a, else d: ReLU and JumpReLU features
  Tanh = 5,    // a tanh z
  Silu = 6,    // a z / (1 + e^-z)
  Sign = 7,    // a sign z
  Angle = 8,   // pair: turned to angle a in its plane, where z > b; the length is kept
  Rotate = 9,  // pair: turned by angle a
};

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

WHIPSTAFF_HOST_DEVICE inline float apply_to_one(Phi phi, const float* arg, float z) {
  switch (phi) {
    case Phi::Affine: return arg[0] * z + arg[1];
    case Phi::Set: return arg[0] - z;
    case Phi::Clamp: return fminf(fmaxf(z, arg[0]), arg[1]) - z;
    case Phi::Gated: return z > arg[0] ? arg[1] * z + arg[2] : arg[3];
    case Phi::Tanh: return arg[0] * tanhf(z);
    case Phi::Silu: return arg[0] * z / (1.0f + expf(-z));
    case Phi::Sign: return z > 0.0f ? arg[0] : z < 0.0f ? -arg[0] : 0.0f;
    default: return 0.0f;
  }
}

// One half of the pair (z[0], z[1]): half 0 or 1.
WHIPSTAFF_HOST_DEVICE inline float apply_to_pair(Phi phi, const float* arg, const float* z, int half) {
  const float cosine = cosf(arg[0]), sine = sinf(arg[0]);
  if (phi == Phi::Rotate) return (half ? sine * z[0] + cosine * z[1] : cosine * z[0] - sine * z[1]) - z[half];
  if (!(z[0] > arg[1])) return 0.0f;
  return sqrtf(z[0] * z[0] + z[1] * z[1]) * (half ? sine : cosine) - z[half];
}

// What direction r adds along its writing vector. A pair's two halves carry the same phi, and the first its arguments.
WHIPSTAFF_HOST_DEVICE inline float apply_phi(const LowrankEdit& edit, int64_t row, int64_t r, const float* z) {
  const Phi phi = edit.phi_of(row, r);
  const bool is_pair = phi == Phi::Angle || phi == Phi::Rotate;
  const int half = is_pair ? r % 2 : 0;
  const float* arg = edit.phi_args + (row * edit.rank + r - half) * NUM_PHI_ARGS;
  if (!is_pair) return apply_to_one(phi, arg, z[r]);
  return r - half + 1 < edit.rank ? apply_to_pair(phi, arg, z + r - half, half) : 0.0f;
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
