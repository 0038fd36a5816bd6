// One row of logits on the CPU, read in blocks of float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "logits.cuh"
#include "softmax.h"

namespace whipstaff {

template <class Body>
void with_float_type(FloatType type, const Body& body) {
  if (type == FloatType::BFloat16) return body(c10::BFloat16{});
  if (type == FloatType::Float16) return body(c10::Half{});
  body(float{});
}

// What normalises a row of logits, and the entropy of what comes of it, in nats.
struct Spread {
  float log_sum = 0, entropy = 0;
};

// One stream's logits for one row.
struct LogitRow {
  const LogitStream* stream;
  int64_t row, vocab;

  void load(float* block, int64_t begin, int64_t size) const {
    with_float_type(stream->type, [&]<class T>(T) {
      whipstaff::load(block, static_cast<const T*>(stream->data) + row * stream->stride + begin, size);
    });
  }

  // use(block, begin, size) over the whole row, as float32.
  template <class Use>
  void for_blocks(const Use& use) const {
    alignas(64) float block[BLOCK];
    for (int64_t begin = 0; begin < vocab; begin += BLOCK) {
      const int64_t size = std::min(BLOCK, vocab - begin);
      load(block, begin, size);
      use(block, begin, size);
    }
  }

  float max() const {
    float best = -INFINITY;
    for_blocks([&](const float* block, int64_t, int64_t size) { best = std::max(best, max_of(block, size)); });
    return best;
  }

  // log of the sum of e^(logit / temperature).
  float log_sum_exp(float max, float temperature) const {
    if (max == -INFINITY) return 0.0f;  // nothing is allowed here: there is no distribution to normalise
    double sum = 0;
    for_blocks(
        [&](const float* block, int64_t, int64_t size) { sum += sum_of_exp(block, size, max, 1 / temperature); });
    return max / temperature + static_cast<float>(std::log(sum));
  }

  // In one pass: with d = logit - max, the entropy is log(sum of e^d) - (sum of d e^d) / (sum of e^d).
  Spread spread(float max) const {
    if (max == -INFINITY) return {};
    double sum = 0, weighted = 0;
    for_blocks([&](const float* block, int64_t, int64_t size) {
      const ExpSums part = exp_sums(block, size, max);
      sum += part.sum, weighted += part.weighted;
    });
    const double log_sum = std::log(sum);
    return {max + static_cast<float>(log_sum), static_cast<float>(log_sum - weighted / sum)};
  }
};

}  // namespace whipstaff
