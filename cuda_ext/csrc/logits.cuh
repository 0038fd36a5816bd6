// Rows of logits of any float type, and their softmax statistics on CUDA.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>

#ifdef WHIPSTAFF_KERNELS
#include "cuda.cuh"
#endif

namespace whipstaff {

constexpr float WHOLE_MASS = 1099511627776.0f;  // 2^40: sums of whole numbers do not depend on their order

enum class FloatType : int32_t { Float32, BFloat16, Float16 };

struct LogitStream {
  const void* data;  // (num_rows, >= vocab)
  int64_t num_rows, stride;
  FloatType type;
};

#ifdef WHIPSTAFF_KERNELS

// What a share of one row of one stream amounts to.
struct Share {
  float best;
  int32_t best_token;
  float sum_of_exp;  // of (logit - best) / temperature
};

template <class Use>
__device__ void with_float_type(FloatType type, const Use& use) {
  if (type == FloatType::BFloat16) return use(__nv_bfloat16{});
  if (type == FloatType::Float16) return use(__half{});
  use(float{});
}

// use(column, logit) for the columns [begin, end) of one row, shared among the block's threads.
template <class Use>
__device__ void for_logits(const LogitStream& stream, int64_t row, int64_t begin, int64_t end, const Use& use) {
  with_float_type(stream.type, [&](auto type) {
    const auto* logits = static_cast<const decltype(type)*>(stream.data) + row * stream.stride;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) use(i, to_float(logits[i]));
  });
}

__device__ inline Share better(const Share& a, const Share& b) {
  return b.best > a.best || (b.best == a.best && b.best_token < a.best_token) ? b : a;
}

// Two shares as one, for a softmax at the given temperature.
__device__ inline Share merge(const Share& a, const Share& b, float temperature) {
  Share both = better(a, b);
  if (both.best == -INFINITY) return both;
  both.sum_of_exp =
      a.sum_of_exp * expf((a.best - both.best) / temperature) + b.sum_of_exp * expf((b.best - both.best) / temperature);
  return both;
}

// Every thread gets the very same bits. The two lanes of a merge do not: the compiler fuses one product with the sum, and
// which of the two it is differs between them. So the first thread's result is everybody's.
__device__ inline Share block_merge(Share share, float temperature) {
  __shared__ Share of_warp[WARP], whole;
  const auto merge_warp = [&] {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      const Share other{__shfl_xor_sync(0xffffffff, share.best, distance),
                        __shfl_xor_sync(0xffffffff, share.best_token, distance),
                        __shfl_xor_sync(0xffffffff, share.sum_of_exp, distance)};
      share = merge(share, other, temperature);
    }
  };
  merge_warp();
  __syncthreads();
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = share;
  __syncthreads();
  const int lane = threadIdx.x % WARP;
  share = lane < blockDim.x / WARP ? of_warp[lane] : Share{-INFINITY, 0, 0.0f};
  merge_warp();
  if (threadIdx.x == 0) whole = share;
  __syncthreads();
  return whole;
}

// The whole block's statistics of the columns [begin, end) of one row, given to every thread.
__device__ inline Share block_share(const LogitStream& stream, int64_t row, int64_t begin, int64_t end,
                                    float temperature) {
  Share share{-INFINITY, 0, 0.0f};
  for_logits(stream, row, begin, end, [&](int64_t i, float logit) {
    if (logit == -INFINITY) return;
    if (logit > share.best)
      share = {logit, static_cast<int32_t>(i), 1.0f + share.sum_of_exp * expf((share.best - logit) / temperature)};
    else
      share.sum_of_exp += expf((logit - share.best) / temperature);
  });
  return block_merge(share, temperature);
}

__device__ inline float log_sum(const Share& share) { return share.best + logf(share.sum_of_exp); }

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
