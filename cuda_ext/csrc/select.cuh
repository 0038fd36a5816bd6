// Weighted selection on CUDA: one block finds the key at which a row's mass, from the largest key down, reaches a goal.
#pragma once

#include "cuda.cuh"
#include "logits.cuh"

namespace whipstaff {

constexpr int NUM_BUCKETS = 2048;  // of keys, by 11 bits of their order at a time

// Masses are summed as integers, so that the order in which threads arrive does not matter.
__device__ inline unsigned long long whole_mass(float mass) {
  return static_cast<unsigned long long>(mass * WHOLE_MASS);
}

__device__ inline unsigned long long block_total(const unsigned long long* mass) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long sum = 0;
  for (int i = threadIdx.x; i < NUM_BUCKETS; i += THREADS) sum += mass[i];
  atomicAdd(&total, sum);
  __syncthreads();
  return total;
}

// The first bucket from the top whose mass carries `before` beyond `target`; `before` gains what lies above it.
__device__ inline int crossing_bucket(const unsigned long long* mass, int num, unsigned long long target,
                                      unsigned long long& before) {
  __shared__ unsigned long long of_chunk[THREADS];
  const int size = num / THREADS;
  unsigned long long sum = 0;
  for (int i = 0; i < size; ++i) sum += mass[threadIdx.x * size + i];
  of_chunk[threadIdx.x] = sum;
  __syncthreads();
  int chunk = THREADS - 1;
  for (; chunk > 0 && before + of_chunk[chunk] <= target; --chunk) before += of_chunk[chunk];
  int bucket = (chunk + 1) * size - 1;
  for (; bucket > chunk * size && before + mass[bucket] <= target; --bucket) before += mass[bucket];
  return bucket;
}

// The largest key such that it and those above it have more mass than target_of(all mass), found 11, 11 and 10 bits at
// a time from the top; the whole block takes part. for_keys(use) calls use(key, mass) for each token of this thread.
template <class ForKeys, class TargetOf>
__device__ uint32_t key_beyond(const ForKeys& for_keys, const TargetOf& target_of) {
  __shared__ unsigned long long mass[NUM_BUCKETS];
  const struct {
    int shift, bits;
  } rounds[] = {{21, 11}, {10, 11}, {0, 10}};
  unsigned long long before = 0, target = 0;
  uint32_t decided = 0;  // the leading bits of the answer
  for (const auto [shift, bits] : rounds) {
    for (int i = threadIdx.x; i < NUM_BUCKETS; i += THREADS) mass[i] = 0;
    __syncthreads();
    for_keys([&](uint32_t key, unsigned long long of_token) {
      const bool is_candidate = of_token > 0 && (shift == 21 || key >> (shift + bits) == decided);
      if (is_candidate) atomicAdd(&mass[(key >> shift) & ((1u << bits) - 1)], of_token);
    });
    __syncthreads();
    if (shift == 21) target = target_of(block_total(mass));
    decided = decided << bits | crossing_bucket(mass, 1 << bits, target, before);
    __syncthreads();
  }
  return decided;
}

}  // namespace whipstaff
