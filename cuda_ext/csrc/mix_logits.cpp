// mix_logits_ on the CPU: what a row's masks and normalisers need first, then one pass over its streams.
#include "mix_logits.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <functional>

#include "logit_row.h"

namespace whipstaff {
namespace {

// The lowest logit that top-p keeps: a token stays if the mass of those before it does not exceed p.
class TopP {
 public:
  static float cut(const LogitRow& row, float max, float p) {
    if (max == -INFINITY) return -FLT_MAX;
    TopP search(row, max);
    const double target = p * search.total;
    double before = 0;
    for (int bucket = 0; bucket < NUM_BUCKETS; ++bucket) {
      if (before + search.mass[bucket] > target) return search.cut_within(bucket, before, target);
      before += search.mass[bucket];
    }
    return -FLT_MAX;
  }

 private:
  static constexpr int NUM_BUCKETS = 2048, PER_NAT = 64;  // logits by their distance below the best
  const LogitRow& row;
  float max;
  double total = 0;
  std::array<double, NUM_BUCKETS> mass{};

  TopP(const LogitRow& logits, float best) : row(logits), max(best) {
    row.for_blocks([&](const float* block, int64_t, int64_t size) {
      float masses[BLOCK];
      int32_t buckets[BLOCK];
      for (int64_t i = 0; i < size; ++i) {
        masses[i] = exp_of_negative(block[i] - max);
        buckets[i] = bucket_of(block[i], max);
      }
      for (int64_t i = 0; i < size; ++i) mass[buckets[i]] += masses[i];
    });
    for (const double part : mass) total += part;
  }

  static int32_t bucket_of(float logit, float max) {
    const float distance = (max - logit) * PER_NAT, last = NUM_BUCKETS - 1;
    return static_cast<int32_t>(distance < last ? distance : last);
  }

  float cut_within(int bucket, double before, double target) const {
    std::vector<float> logits;
    row.for_blocks([&](const float* block, int64_t, int64_t size) {
      std::copy_if(block, block + size, std::back_inserter(logits), [&](float x) { return bucket_of(x, max) == bucket; });
    });
    std::sort(logits.begin(), logits.end(), std::greater<>());
    size_t kept = 0;
    for (; kept < logits.size() && before <= target; ++kept) before += exp_of_negative(logits[kept] - max);
    return std::max(logits[kept - 1], -FLT_MAX);
  }
};

// mixed += scale * logit where logit >= cut; elsewhere the token is banned, and once banned, banned for good.
template <class T>
void add_term(float* __restrict mixed, const T* __restrict logits, int64_t size, float scale, float cut) {
  for (int64_t i = 0; i < size; ++i) {
    const float logit = static_cast<float>(logits[i]), sum = mixed[i] + scale * logit;
    mixed[i] = logit < cut ? -INFINITY : sum;
  }
}

// What one stream adds to the mix.
struct Term {
  LogitRow row;
  float scale, cut;

  void add_to(float* mixed, int64_t begin, int64_t size) const {
    with_float_type(row.stream->type, [&]<class T>(T) {
      const T* logits = static_cast<const T*>(row.stream->data) + row.row * row.stream->stride + begin;
      add_term(mixed, logits, size, scale, cut);
    });
  }
};

inline int32_t count_allowed(const float* mixed, int64_t size) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += mixed[i] != -INFINITY;
  return count;
}

// One row of the batch: its terms, and the constant that normalises the log-softmax streams among them.
struct RowMix {
  const MixLogits& mix;
  int64_t row;
  std::array<Term, MAX_STREAMS> terms;
  int num_terms = 0;
  double constant = 0;

  RowMix(const MixLogits& mix, int64_t row) : mix(mix), row(row) {
    for (int k = 0; k < mix.num_streams; ++k) {
      const StreamUse use = mix.use(row, k);
      if (use.row >= 0) add(LogitRow{&mix.stream[k], use.row, mix.vocab}, use);
    }
  }

  void add(const LogitRow& logits, const StreamUse& use) {
    const bool is_normalised = use.is_log_softmax && use.weight != 0.0f;
    const float max = is_normalised || use.is_masked() ? logits.max() : 0.0f;
    float cut = -FLT_MAX;  // lets everything pass but -inf
    if (use.alpha > 0.0f) cut = std::max(cut, max + std::log(use.alpha));
    if (use.top_p < 1.0f) cut = std::max(cut, TopP::cut(logits, max, use.top_p));
    if (is_normalised) constant -= use.weight * logits.log_sum_exp(max, use.temperature);
    terms[num_terms++] = {logits, use.weight / use.temperature, cut};
  }

  template <class Out>
  void run() const {
    Out* out = static_cast<Out*>(mix.out) + row * mix.out_stride;
    const bool is_masked = mix.is_masked(row);
    alignas(64) float mixed[BLOCK];
    Best best;
    int32_t num_allowed = 0;
    for (int64_t begin = 0; begin < mix.vocab; begin += BLOCK) {
      const int64_t size = std::min(BLOCK, mix.vocab - begin);
      std::fill_n(mixed, size, static_cast<float>(constant));
      for (int k = 0; k < num_terms; ++k) terms[k].add_to(mixed, begin, size);
      if (is_masked) best.look_at(terms[0].row, begin, size);  // before out overwrites it
      if (is_masked || mix.num_allowed) num_allowed += count_allowed(mixed, size);
      store(out + begin, mixed, size);
    }
    if (is_masked && num_allowed == 0 && best.token >= 0) out[best.token] = static_cast<Out>(best.logit);
    if (mix.num_allowed) mix.num_allowed[row] = num_allowed;
  }

  // The main stream's best token: what remains when the masks of several streams exclude each other.
  struct Best {
    int64_t token = -1;
    float logit = -INFINITY;

    void look_at(const LogitRow& main, int64_t begin, int64_t size) {
      alignas(64) float block[BLOCK];
      main.load(block, begin, size);
      const float top = max_of(block, size);
      if (top <= logit) return;
      logit = top;
      token = begin + (std::find(block, block + size, top) - block);
    }
  };
};

void mix_logits_cpu(const Tensor& out, const std::vector<Tensor>& streams, const Tensor& rows, const Tensor& weights,
                    const MaybeTensor& temperatures, const MaybeTensor& log_softmax, const MaybeTensor& alphas,
                    const MaybeTensor& top_ps, const MaybeTensor& num_allowed) {
  const MixLogits mix = mix_logits(out, streams, rows, weights, temperatures, log_softmax, alphas, top_ps, num_allowed);
  if (is_checked_mode()) check_stream_rows(mix);
  for_rows(mix.num_rows, mix.vocab * mix.num_streams, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (mix.is_mixed(row)) with_float_type(mix.out_type, [&]<class Out>(Out) { RowMix(mix, row).run<Out>(); });
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("mix_logits_", TORCH_BOX(&whipstaff::mix_logits_cpu));
}
