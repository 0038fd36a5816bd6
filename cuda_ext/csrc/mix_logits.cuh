// The mixing of one batch of logit rows as pointers and sizes, and the CUDA kernels that perform it.
#pragma once

#include "logits.cuh"

#include <cfloat>

#ifdef WHIPSTAFF_KERNELS
#include "select.cuh"
#endif

namespace whipstaff {

constexpr int MAX_STREAMS = 8;

// How one row uses one stream. `row` is -1 where it does not.
struct StreamUse {
  int64_t row;
  float weight, temperature, alpha, top_p;
  bool is_log_softmax;

  WHIPSTAFF_HOST_DEVICE bool is_masked() const { return alpha > 0.0f || top_p < 1.0f; }
};

struct MixLogits {
  void* out;  // (num_rows, vocab), rows `out_stride` elements apart
  int64_t num_rows, vocab, out_stride;
  FloatType out_type;
  int num_streams;
  LogitStream stream[MAX_STREAMS];
  const void* rows;  // (num_rows, num_streams) int32 or int64, as all tables below
  bool rows_are_int64;
  const float *weights, *temperatures, *alphas, *top_ps;  // all but weights may be null
  const bool* log_softmax;                                // or null
  int32_t* num_allowed;                                   // (num_rows,), or null

  WHIPSTAFF_HOST_DEVICE int64_t raw_row(int64_t row, int k) const {
    const int64_t i = row * num_streams + k;
    return rows_are_int64 ? static_cast<const int64_t*>(rows)[i] : static_cast<const int32_t*>(rows)[i];
  }

  // Whether a row is mixed at all: its main stream, number 0, names a row.
  WHIPSTAFF_HOST_DEVICE bool is_mixed(int64_t row) const {
    const int64_t main = raw_row(row, 0);
    return main >= 0 && main < stream[0].num_rows;
  }

  // The main stream is always looked at: what it bans stays banned, whatever its weight.
  WHIPSTAFF_HOST_DEVICE StreamUse use(int64_t row, int k) const {
    const int64_t i = row * num_streams + k, source = raw_row(row, k);
    StreamUse use{.row = source,
                  .weight = weights[i],
                  .temperature = temperatures ? temperatures[i] : 1.0f,
                  .alpha = alphas ? alphas[i] : 0.0f,
                  .top_p = top_ps ? top_ps[i] : 1.0f,
                  .is_log_softmax = log_softmax && log_softmax[i]};
    const bool is_used = k == 0 || use.weight != 0.0f || use.is_masked();
    if (!is_used || source < 0 || source >= stream[k].num_rows) use.row = -1;
    return use;
  }

  WHIPSTAFF_HOST_DEVICE bool is_masked(int64_t row) const {
    for (int k = 0; k < num_streams; ++k) {
      const StreamUse used = use(row, k);
      if (used.row >= 0 && used.is_masked()) return true;
    }
    return false;
  }
};

#ifdef WHIPSTAFF_KERNELS

constexpr int MIX_COLUMNS = 4;  // columns per thread and step
constexpr int NUM_SPLITS = 8;   // blocks that share one row's statistics

// What one stream adds to a row: scale * logit where logit >= cut.
struct MixTerm {
  int64_t row;  // -1: nothing
  float scale, cut;
};

// Device memory that lives for one call.
struct MixWorkspace {
  Share* shares;     // (num_rows, num_streams, NUM_SPLITS)
  MixTerm* terms;    // (num_rows, num_streams)
  float* constants;  // (num_rows, num_streams) what normalises the stream, already weighted
  int32_t* allowed;  // (num_rows,)
  Share* main_best;  // (num_rows,)
};

__device__ inline bool needs_statistics(const StreamUse& use) {
  return use.row >= 0 && ((use.is_log_softmax && use.weight != 0.0f) || use.is_masked());
}

// Block (row, k, split): the statistics of its share of the vocabulary, where the row needs them.
__global__ void __launch_bounds__(THREADS) share_kernel(const MixLogits mix, const MixWorkspace work) {
  const int64_t row = blockIdx.x, k = blockIdx.y, split = blockIdx.z;
  if (!mix.is_mixed(row)) return;
  const StreamUse use = mix.use(row, k);
  if (!needs_statistics(use) && !(k == 0 && mix.is_masked(row))) return;
  const int64_t size = (mix.vocab + NUM_SPLITS - 1) / NUM_SPLITS, begin = split * size;
  const int64_t end = begin + size < mix.vocab ? begin + size : mix.vocab;
  const Share share = block_share(mix.stream[k], use.row, begin, end, use.temperature);
  if (threadIdx.x == 0) work.shares[(row * mix.num_streams + k) * NUM_SPLITS + split] = share;
}

// Bits that order like the floats they come from.
__device__ inline uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered_bits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// The lowest logit that top-p keeps; the whole block takes part.
__device__ inline float top_p_cut(const LogitStream& stream, int64_t row, int64_t vocab, float best, float p) {
  const auto for_keys = [&](const auto& use) {
    for_logits(stream, row, 0, vocab, [&](int64_t, float logit) {
      if (logit != -INFINITY) use(ordered_bits(logit), whole_mass(expf(logit - best)));
    });
  };
  const uint32_t key = key_beyond(for_keys, [&](unsigned long long total) {
    return static_cast<unsigned long long>(static_cast<double>(p) * static_cast<double>(total));
  });
  return fmaxf(from_ordered_bits(key), -FLT_MAX);
}

// Block (row, k): the stream's term in the row's mix. Shared shares are merged; top-p reads the row again.
__global__ void __launch_bounds__(THREADS) term_kernel(const MixLogits mix, const MixWorkspace work) {
  const int64_t row = blockIdx.x, k = blockIdx.y;
  if (!mix.is_mixed(row)) return;
  const StreamUse use = mix.use(row, k);
  const bool has_statistics = needs_statistics(use) || (k == 0 && mix.is_masked(row));
  Share whole{-INFINITY, 0, 0.0f};
  for (int split = 0; has_statistics && split < NUM_SPLITS; ++split)
    whole = merge(whole, work.shares[(row * mix.num_streams + k) * NUM_SPLITS + split], use.temperature);
  MixTerm term{use.row, use.weight / use.temperature, -FLT_MAX};
  float constant = 0;
  if (needs_statistics(use) && whole.best != -INFINITY) {
    if (use.alpha > 0.0f) term.cut = fmaxf(term.cut, whole.best + logf(use.alpha));
    if (use.top_p < 1.0f)
      term.cut = fmaxf(term.cut, top_p_cut(mix.stream[k], use.row, mix.vocab, whole.best, use.top_p));
    if (use.is_log_softmax && use.weight != 0.0f)
      constant = use.weight * (whole.best / use.temperature + logf(whole.sum_of_exp));
  }
  if (threadIdx.x != 0) return;
  work.terms[row * mix.num_streams + k] = term;
  work.constants[row * mix.num_streams + k] = constant;
  if (k == 0) work.main_best[row] = whole, work.allowed[row] = 0;
}

template <class Out, int N>
__device__ void mix_columns(const MixLogits& mix, const MixTerm* terms, float constant, int64_t column,
                            float (&sum)[N]) {
  for (int i = 0; i < N; ++i) sum[i] = -constant;
  for (int k = 0; k < mix.num_streams; ++k) {
    const MixTerm term = terms[k];
    if (term.row < 0) continue;
    with_float_type(mix.stream[k].type, [&](auto type) {
      float logit[N];
      load(logit, static_cast<const decltype(type)*>(mix.stream[k].data) + term.row * mix.stream[k].stride + column);
      for (int i = 0; i < N; ++i) sum[i] = logit[i] < term.cut ? -INFINITY : sum[i] + term.scale * logit[i];
    });
  }
}

// Block (row, chunk): mixes its columns of the row; N columns per thread and step.
template <class Out, int N>
__global__ void __launch_bounds__(THREADS) mix_kernel(const MixLogits mix, const MixWorkspace work) {
  const int64_t row = blockIdx.x;
  if (!mix.is_mixed(row)) return;
  __shared__ MixTerm terms[MAX_STREAMS];
  if (threadIdx.x < mix.num_streams) terms[threadIdx.x] = work.terms[row * mix.num_streams + threadIdx.x];
  float constant = 0;
  for (int k = 0; k < mix.num_streams; ++k) constant += work.constants[row * mix.num_streams + k];
  __syncthreads();
  Out* out = static_cast<Out*>(mix.out) + row * mix.out_stride;
  int allowed = 0;
  const int64_t step = int64_t(gridDim.y) * THREADS * N;
  for (int64_t column = (int64_t(blockIdx.y) * THREADS + threadIdx.x) * N; column < mix.vocab; column += step) {
    float sum[N];
    mix_columns<Out>(mix, terms, constant, column, sum);
    for (int i = 0; i < N; ++i) allowed += sum[i] != -INFINITY;
    store(out + column, sum);
  }
  allowed = __reduce_add_sync(0xffffffff, allowed);
  if (threadIdx.x % WARP == 0 && allowed > 0) atomicAdd(&work.allowed[row], allowed);
}

// Thread per row: reports how many tokens are left; where masks excluded each other, the main stream's best is.
template <class Out>
__global__ void rescue_kernel(const MixLogits mix, const MixWorkspace work) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= mix.num_rows || !mix.is_mixed(row)) return;
  const Share best = work.main_best[row];
  if (work.allowed[row] == 0 && mix.is_masked(row) && best.best != -INFINITY)
    static_cast<Out*>(mix.out)[row * mix.out_stride + best.best_token] = from_float<Out>(best.best);
  if (mix.num_allowed) mix.num_allowed[row] = work.allowed[row];
}

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
