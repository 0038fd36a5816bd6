// Locally typical sets of logit rows: pointers, sizes and the CUDA kernel.
#pragma once

#include "logits.cuh"

#ifdef WHIPSTAFF_KERNELS
#include "select.cuh"
#endif

namespace whipstaff {

struct Typical {
  LogitStream logits;  // (num_rows, vocab), changed in place
  int64_t vocab;
  const float* mass;  // (num_rows,)

  WHIPSTAFF_HOST_DEVICE bool is_cut(int64_t row) const { return mass[row] < 1.0f; }

  // What the set must hold: no more than there is, but at least something, so that a token stays.
  WHIPSTAFF_HOST_DEVICE int64_t wanted(int64_t row, int64_t total) const {
    const int64_t asked = mass[row] > 0.0f ? static_cast<int64_t>(mass[row] * WHOLE_MASS) : 0;
    const int64_t most = asked < total ? asked : total;
    return most > 1 ? most : 1;
  }
};

// How far the surprise of a token is from the expected one, in nats; infinite for what is banned.
WHIPSTAFF_HOST_DEVICE inline float deviation_of(float logit, float log_sum, float entropy) {
  return std::fabs((logit - log_sum) + entropy);
}

#ifdef WHIPSTAFF_KERNELS

// Block r cuts row r. Deviations are not negative, so they are ordered as their bits; the least has the largest key.
template <class T>
__global__ void __launch_bounds__(THREADS) typical_kernel(const Typical work) {
  const int64_t row = blockIdx.x;
  if (!work.is_cut(row)) return;
  const Share share = block_share(work.logits, row, 0, work.vocab, 1.0f);
  if (share.best == -INFINITY) return;
  const float sum = log_sum(share);
  float entropy = 0;
  for_logits(work.logits, row, 0, work.vocab, [&](int64_t, float logit) {
    const float log_p = logit - sum, p = expf(log_p);
    if (p > 0.0f) entropy -= p * log_p;
  });
  entropy = block_sum(entropy);
  const auto key_of = [&](float logit) { return ~__float_as_uint(deviation_of(logit, sum, entropy)); };
  const auto for_keys = [&](const auto& use) {
    for_logits(work.logits, row, 0, work.vocab,
               [&](int64_t, float logit) { use(key_of(logit), whole_mass(expf(logit - sum))); });
  };
  const uint32_t least = key_beyond(for_keys, [&](unsigned long long total) {
    return static_cast<unsigned long long>(work.wanted(row, total) - 1);
  });
  T* logits = static_cast<T*>(const_cast<void*>(work.logits.data)) + row * work.logits.stride;
  for (int64_t i = threadIdx.x; i < work.vocab; i += THREADS)
    if (key_of(to_float(logits[i])) < least) logits[i] = from_float<T>(-INFINITY);
}

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
