// What the CUDA kernels share: float32 arithmetic on 16-byte packs of any float type, and sums over a block.
#pragma once

#ifdef WHIPSTAFF_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

namespace whipstaff {

constexpr int THREADS = 256;
constexpr int WARP = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The shared memory that a launch asked for, aligned for packs.
#ifdef WHIPSTAFF_CUDA_ON_CPU
using cuda_on_cpu::dynamic_shared;
#else
__device__ inline float* dynamic_shared() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}
#endif

// N neighbouring elements, moved in as few memory transactions as their size allows.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

template <int N, class T>
__device__ void load(float (&into)[N], const T* from) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) into[i] = to_float(pack.value[i]);
}

template <int N, class T>
__device__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class Combine>
__device__ float warp_reduce(float value, Combine combine) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
  return value;
}

// The combined value of all threads of the block, given to every one of them.
template <class Combine>
__device__ float block_reduce(float value, float neutral, Combine combine) {
  __shared__ float of_warp[WARP];
  value = warp_reduce(value, combine);
  __syncthreads();
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
  __syncthreads();
  const int lane = threadIdx.x % WARP;
  return warp_reduce(lane < blockDim.x / WARP ? of_warp[lane] : neutral, combine);
}

__device__ inline float block_sum(float value) {
  return block_reduce(value, 0.0f, [](float a, float b) { return a + b; });
}

}  // namespace whipstaff
