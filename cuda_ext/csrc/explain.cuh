// The temperature of logit rows, and how rows differ: pointers, sizes and the CUDA kernels.
#pragma once

#include "logits.cuh"

namespace whipstaff {

constexpr float LN_2 = 0.693147181f;

struct Temper {
  LogitStream logits;  // (num_rows, vocab), changed in place
  int64_t vocab;
  const float* temperature;  // (num_rows,)

  // 1 and anything below 0 leave the row alone.
  WHIPSTAFF_HOST_DEVICE bool is_tempered(int64_t row) const {
    return temperature[row] >= 0.0f && temperature[row] != 1.0f;
  }
};

struct Explain {
  LogitStream final, base;  // base.data is null where there is nothing to compare with
  int64_t num_rows, vocab;
  float *entropy, *divergence;  // (num_rows,)
};

// A token adds m log cosh((log p - log q) / 2): half of m (log m - log q) + m (log m - log p), which would cancel.
struct Divergences {
  LogitStream mature, early;
  const int64_t* owners;  // (num_early,) a row of mature for each of early
  int64_t num_early, vocab;
  float* divergence;  // (num_early,)

  WHIPSTAFF_HOST_DEVICE bool has_owner(int64_t pair) const {
    return owners[pair] >= 0 && owners[pair] < mature.num_rows;
  }
};

#ifdef WHIPSTAFF_KERNELS

// Block r tempers row r: divided by its temperature, or at temperature 0 only the first best token left.
template <class T>
__global__ void __launch_bounds__(THREADS) temper_kernel(const Temper temper) {
  const int64_t row = blockIdx.x;
  if (!temper.is_tempered(row)) return;
  const float temperature = temper.temperature[row];
  T* logits = static_cast<T*>(const_cast<void*>(temper.logits.data)) + row * temper.logits.stride;
  if (temperature > 0.0f) {
    for (int64_t i = threadIdx.x; i < temper.vocab; i += THREADS)
      logits[i] = from_float<T>(to_float(logits[i]) / temperature);
    return;
  }
  const Share best = block_share(temper.logits, row, 0, temper.vocab, 1.0f);
  for (int64_t i = threadIdx.x; i < temper.vocab; i += THREADS)
    if (i != best.best_token) logits[i] = from_float<T>(-INFINITY);
}

__device__ inline float logit_at(const LogitStream& stream, int64_t row, int64_t i) {
  float logit = 0;
  with_float_type(stream.type, [&](auto type) {
    logit = to_float(static_cast<const decltype(type)*>(stream.data)[row * stream.stride + i]);
  });
  return logit;
}

// Block p compares row p of the early ones with its owner.
__global__ inline void __launch_bounds__(THREADS) divergence_kernel(const Divergences work) {
  const int64_t pair = blockIdx.x;
  if (!work.has_owner(pair)) return;
  const int64_t row = work.owners[pair];
  const float q_sum = log_sum(block_share(work.mature, row, 0, work.vocab, 1.0f));
  const float p_sum = log_sum(block_share(work.early, pair, 0, work.vocab, 1.0f));
  float sum = 0;
  for_logits(work.early, pair, 0, work.vocab, [&](int64_t i, float logit) {
    const float log_q = logit_at(work.mature, row, i) - q_sum, log_p = logit - p_sum;
    if (log_q == -INFINITY) return;
    const float m = 0.5f * (expf(log_q) + expf(log_p)), gap = fabsf(log_p - log_q);
    if (m > 0.0f) sum += m * (0.5f * gap + log1pf(expf(-gap)) - LN_2);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) work.divergence[pair] = sum;
}

// Block r compares row r of the two.
__global__ inline void __launch_bounds__(THREADS) explain_kernel(const Explain explain) {
  const int64_t row = blockIdx.x;
  const float final_sum = log_sum(block_share(explain.final, row, 0, explain.vocab, 1.0f));
  const bool has_base = explain.base.data != nullptr;
  const float base_sum = has_base ? log_sum(block_share(explain.base, row, 0, explain.vocab, 1.0f)) : 0.0f;
  float entropy = 0, divergence = 0;
  for_logits(explain.final, row, 0, explain.vocab, [&](int64_t i, float logit) {
    const float log_p = logit - final_sum, p = expf(log_p);
    if (p == 0.0f) return;
    entropy -= p * log_p;
    if (has_base) divergence += p * (log_p - (logit_at(explain.base, row, i) - base_sum));
  });
  entropy = block_sum(entropy);
  divergence = block_sum(divergence);
  if (threadIdx.x == 0) explain.entropy[row] = entropy, explain.divergence[row] = divergence;
}

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
