// typical_rows_ on the CPU: a histogram of each row's mass by deviation, then a search within one bucket of it.
#include "typical.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <bit>
#include <vector>

#include "logit_row.h"

namespace whipstaff {
namespace {

// Finds the deviation at which a row's typical set ends. Masses are whole numbers of at most 2^40 and so are all sums
// of them below 2^53, which a double holds exactly: no order of adding changes a result.
class TypicalSet {
 public:
  // The least deviation such that the tokens whose deviations do not exceed it have the mass that is wanted.
  template <class Wanted>
  float limit(const LogitRow& row, const Spread& spread, const Wanted& wanted) {
    fill_buckets(row, spread);
    double total = 0;
    for (const double mass : buckets) total += mass;
    const double goal = static_cast<double>(wanted(static_cast<int64_t>(total)));
    int crossing = 0;
    double before = 0;
    while (crossing < NUM_BUCKETS - 1 && before + buckets[crossing] < goal) before += buckets[crossing++];
    collect(row, spread, Bucket{crossing});
    return limit_within(Bucket{crossing}, goal - before);
  }

 private:
  static constexpr int NUM_BUCKETS = 2048, PER_NAT = 64, GROUP = 32;

  // The deviations from `low` on to before `high`; the last bucket has all the rest.
  struct Bucket {
    float low, high;

    explicit Bucket(int number)
        : low(static_cast<float>(number) / PER_NAT),
          high(number < NUM_BUCKETS - 1 ? static_cast<float>(number + 1) / PER_NAT : INFINITY) {}

    bool holds(float deviation) const { return deviation >= low && deviation < high; }
  };

  std::array<double, NUM_BUCKETS> buckets;
  std::vector<uint32_t> candidates;  // deviations as bits, which order like the numbers that are not negative
  std::vector<float> masses_of_candidates;

  static float mass_of(float logit, const Spread& spread) {
    return std::trunc(exp_of_negative(logit - spread.log_sum) * WHOLE_MASS);
  }

  static int32_t bucket_of(float deviation) {
    const float place = deviation * PER_NAT, last = NUM_BUCKETS - 1;
    return static_cast<int32_t>(place < last ? place : last);
  }

  void fill_buckets(const LogitRow& row, const Spread& spread) {
    buckets.fill(0);
    row.for_blocks([&](const float* logits, int64_t, int64_t size) {
      float masses[BLOCK];
      int32_t numbers[BLOCK];
      for (int64_t i = 0; i < size; ++i) {
        masses[i] = mass_of(logits[i], spread);
        const int32_t own = bucket_of(deviation_of(logits[i], spread.log_sum, spread.entropy));
        numbers[i] = masses[i] > 0.0f ? own : static_cast<int32_t>(i);  // adding nothing need not wait for its bucket
      }
      for (int64_t i = 0; i < size; ++i) buckets[numbers[i]] += masses[i];
    });
  }

  void collect(const LogitRow& row, const Spread& spread, const Bucket& bucket) {
    candidates.clear();
    masses_of_candidates.clear();
    row.for_blocks([&](const float* logits, int64_t, int64_t size) {
      float deviations[BLOCK];
      for (int64_t i = 0; i < size; ++i) deviations[i] = deviation_of(logits[i], spread.log_sum, spread.entropy);
      for (int64_t begin = 0; begin < size; begin += GROUP) {
        const int64_t end = std::min(begin + GROUP, size);
        int32_t num = 0;  // most groups have none
        for (int64_t i = begin; i < end; ++i) num += bucket.holds(deviations[i]);
        for (int64_t i = begin; num > 0; ++i) {
          if (!bucket.holds(deviations[i])) continue;
          candidates.push_back(std::bit_cast<uint32_t>(deviations[i]));
          masses_of_candidates.push_back(mass_of(logits[i], spread));
          --num;
        }
      }
    });
  }

  double mass_up_to(uint32_t most) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < candidates.size(); ++i) sum += candidates[i] <= most ? masses_of_candidates[i] : 0.0f;
    return sum;
  }

  float limit_within(const Bucket& bucket, double goal) const {
    uint32_t low = std::bit_cast<uint32_t>(bucket.low), high = std::bit_cast<uint32_t>(bucket.high);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (mass_up_to(middle) < goal)
        low = middle + 1;
      else
        high = middle;
    }
    return std::bit_cast<float>(low);
  }
};

template <class T>
void cut(T* logits, int64_t size, const Spread& spread, float limit) {
  for (int64_t i = 0; i < size; ++i) {
    const float deviation = deviation_of(static_cast<float>(logits[i]), spread.log_sum, spread.entropy);
    logits[i] = deviation > limit ? static_cast<T>(-INFINITY) : logits[i];
  }
}

void typical_rows_cpu(const Tensor& logits, const Tensor& mass) {
  const Typical work = typical(logits, mass);
  for_rows(logits.size(0), work.vocab, [&](int64_t begin, int64_t end) {
    TypicalSet set;
    for (int64_t row = begin; row < end; ++row) {
      if (!work.is_cut(row)) continue;
      const LogitRow own{&work.logits, row, work.vocab};
      const float best = own.max();
      if (best == -INFINITY) continue;
      const Spread spread = own.spread(best);
      const float limit = set.limit(own, spread, [&](int64_t total) { return work.wanted(row, total); });
      with_float_type(work.logits.type, [&]<class T>(T) {
        T* data = static_cast<T*>(const_cast<void*>(work.logits.data)) + row * work.logits.stride;
        cut(data, work.vocab, spread, limit);
      });
    }
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("typical_rows_", TORCH_BOX(&whipstaff::typical_rows_cpu));
}
