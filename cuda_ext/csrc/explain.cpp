// apply_temperature_, explain_rows and divergences on the CPU.
#include "explain.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "logit_row.h"

namespace whipstaff {
namespace {

template <class T>
void divide(T* logits, int64_t size, float temperature) {
  for (int64_t i = 0; i < size; ++i) logits[i] = static_cast<T>(static_cast<float>(logits[i]) / temperature);
}

template <class T>
void keep_best(T* logits, int64_t size) {
  const auto less = [](T a, T b) { return static_cast<float>(a) < static_cast<float>(b); };
  const int64_t best = std::max_element(logits, logits + size, less) - logits;  // the first on ties
  std::fill(logits, logits + best, static_cast<T>(-INFINITY));
  std::fill(logits + best + 1, logits + size, static_cast<T>(-INFINITY));
}

void apply_temperature_cpu(const Tensor& logits, const Tensor& temperature) {
  check_rows(logits, "logits");
  const Temper work = temper(logits, temperature);
  if (work.vocab == 0) return;
  with_float_type(work.logits.type, [&]<class T>(T) {
    for_rows(logits.size(0), work.vocab, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* data = static_cast<T*>(logits.data_ptr()) + row * work.logits.stride;
        const float t = work.temperature[row];
        if (work.is_tempered(row)) t > 0.0f ? divide(data, work.vocab, t) : keep_best(data, work.vocab);
      }
    });
  });
}

// p: the probabilities of a block of logits.
void probabilities(const float* __restrict logits, float* __restrict p, int64_t size, float log_sum) {
  for (int64_t i = 0; i < size; ++i) p[i] = logits[i] == -INFINITY ? 0.0f : exp_of_negative(logits[i] - log_sum);
}

// Sum of p * (log p); what has no mass adds nothing, even where its logit is -inf.
double sum_p_log_p(const float* p, const float* logits, int64_t size, float log_sum) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i)
    if (p[i] > 0.0f) sum += p[i] * (logits[i] - log_sum);
  return sum;
}

void explain_row(const Explain& work, int64_t row) {
  const LogitRow final{&work.final, row, work.vocab}, base{&work.base, row, work.vocab};
  const Spread spread = final.spread(final.max());
  work.entropy[row] = spread.entropy;
  work.divergence[row] = 0.0f;
  if (work.base.data == nullptr) return;
  const float final_sum = spread.log_sum, base_sum = base.spread(base.max()).log_sum;
  double of_final = 0, of_base = 0;  // sums of p log p and p log q
  final.for_blocks([&](const float* logits, int64_t begin, int64_t size) {
    float p[BLOCK], base_logits[BLOCK];
    probabilities(logits, p, size, final_sum);
    of_final += sum_p_log_p(p, logits, size, final_sum);
    base.load(base_logits, begin, size);
    of_base += sum_p_log_p(p, base_logits, size, base_sum);
  });
  work.divergence[row] = static_cast<float>(of_final - of_base);
}

Explanation explain_rows_cpu(const Tensor& final, const MaybeTensor& base) {
  const Explanation results = new_explanation(final);
  const Explain work = explain(final, base, results);
  for_rows(work.num_rows, work.vocab, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) explain_row(work, row);
  });
  return results;
}

// log(1 + t) for t in [0, 1]: twice the area tangent of t / (2 + t), which is at most 1/3.
inline float log1p_of_unit(float t) {
  const float s = t / (2.0f + t), square = s * s;
  float sum = 1.0f / 15;
  sum = sum * square + 1.0f / 13;
  sum = sum * square + 1.0f / 11;
  sum = sum * square + 1.0f / 9;
  sum = sum * square + 1.0f / 7;
  sum = sum * square + 1.0f / 5;
  sum = sum * square + 1.0f / 3;
  return 2.0f * s * (sum * square + 1.0f);
}

float divergence_of(const float* mature, const float* early, int64_t size, float q_sum, float p_sum) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const float log_q = mature[i] - q_sum, log_p = early[i] - p_sum, gap = std::fabs(log_p - log_q);
    const float m = 0.5f * (exp_of_negative(log_q) + exp_of_negative(log_p));
    const float term = m * (0.5f * gap + log1p_of_unit(exp_of_negative(-gap)) - LN_2);
    sum += mature[i] == -INFINITY ? 0.0f : term;
  }
  return sum;
}

void compare(const Divergences& work, int64_t pair, float q_sum) {
  const LogitRow mature{&work.mature, work.owners[pair], work.vocab}, early{&work.early, pair, work.vocab};
  const float p_sum = early.log_sum_exp(early.max(), 1.0f);
  double sum = 0;
  mature.for_blocks([&](const float* logits, int64_t begin, int64_t size) {
    alignas(64) float other[BLOCK];
    early.load(other, begin, size);
    sum += divergence_of(logits, other, size, q_sum, p_sum);
  });
  work.divergence[pair] = static_cast<float>(sum);
}

Tensor divergences_cpu(const Tensor& mature, const Tensor& early, const Tensor& owners) {
  const Tensor result = new_divergences(mature, early);
  const Divergences work = divergences(mature, early, owners, result);
  std::vector<float> q_sums(work.mature.num_rows);
  for_rows(work.mature.num_rows, work.vocab, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const LogitRow logits{&work.mature, row, work.vocab};
      q_sums[row] = logits.log_sum_exp(logits.max(), 1.0f);
    }
  });
  for_rows(work.num_early, work.vocab, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      if (work.has_owner(pair)) compare(work, pair, q_sums[work.owners[pair]]);
  });
  return result;
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("apply_temperature_", TORCH_BOX(&whipstaff::apply_temperature_cpu));
  library.impl("explain_rows", TORCH_BOX(&whipstaff::explain_rows_cpu));
  library.impl("divergences", TORCH_BOX(&whipstaff::divergences_cpu));
}
