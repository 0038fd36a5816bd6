// attention_rows on the CPU: scores of one query head against its keys, a softmax, and the maximum over heads.
#include "attention_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu.h"
#include "softmax.h"

namespace whipstaff {
namespace {

template <class T>
float dot(const T* __restrict a, const T* __restrict b, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return sum;
}

// scores -> probabilities; a position whose key is missing has score -inf and gets none.
void softmax(float* scores, int64_t size) {
  const float best = max_of(scores, size);
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    scores[i] = scores[i] == -INFINITY ? 0.0f : exp_of_negative(scores[i] - best);
    sum += scores[i];
  }
  const float factor = sum > 0 ? static_cast<float>(1 / sum) : 0.0f;
  for (int64_t i = 0; i < size; ++i) scores[i] *= factor;
}

// scores (context,) of one query head against keys whose elements lie side by side.
template <class T>
void score_keys(const AttentionRows& rows, int64_t row, int64_t head, const T* query, float* scores) {
  const T* keys = static_cast<const T*>(rows.keys);
  for (int64_t position = 0; position < rows.context_of(row); ++position) {
    const int64_t key = rows.key_offset(row, head, position);
    scores[position] = key < 0 ? -INFINITY : rows.scale * dot(query, keys + key, rows.head_size);
  }
}

// The same where a block keeps one element of all its keys after the other, as vLLM's CPU kernels have it.
template <class T>
void score_transposed_keys(const AttentionRows& rows, int64_t row, int64_t head, const T* query, float* scores) {
  const int64_t context = rows.context_of(row), stride = rows.key_stride[1];
  for (int64_t first = 0; first < context; first += rows.block_size) {
    const int64_t key = rows.key_offset(row, head, first), num = std::min(rows.block_size, context - first);
    std::fill_n(scores + first, num, key < 0 ? -INFINITY : 0.0f);
    for (int64_t d = 0; key >= 0 && d < rows.head_size; ++d) {
      const T* __restrict elements = static_cast<const T*>(rows.keys) + key + d * rows.key_stride[3];
      const float factor = rows.scale * static_cast<float>(query[d]);
      float* __restrict of_block = scores + first;
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < num; ++i) of_block[i] += factor * static_cast<float>(elements[i]);
      } else {
        for (int64_t i = 0; i < num; ++i) of_block[i] += factor * static_cast<float>(elements[i * stride]);
      }
    }
  }
}

// probabilities (max_context,) of one head; what the row does not see reads 0.
template <class T>
void attend(const AttentionRows& rows, int64_t row, int64_t head, float* probabilities) {
  const T* query = static_cast<const T*>(rows.query) + row * rows.query_stride[0] + head * rows.query_stride[1];
  const int64_t context = rows.context_of(row);
  (rows.key_stride[3] == 1 ? score_keys<T> : score_transposed_keys<T>)(rows, row, head, query, probabilities);
  softmax(probabilities, context);
  std::fill(probabilities + context, probabilities + rows.max_context, 0.0f);
}

template <class T>
void run_per_head(const AttentionRows& rows) {
  for_rows(rows.num_rows * rows.num_heads, rows.max_context * rows.head_size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      attend<T>(rows, i / rows.num_heads, i % rows.num_heads, rows.out + i * rows.max_context);
  });
}

template <class T>
void run_head_max(const AttentionRows& rows) {
  for_rows(rows.num_rows, rows.num_heads * rows.max_context * rows.head_size, [&](int64_t begin, int64_t end) {
    std::vector<float> of_head(rows.max_context);
    for (int64_t i = begin; i < end; ++i) {
      float* out = rows.out + i * rows.max_context;
      std::fill_n(out, rows.max_context, 0.0f);
      for (int64_t head = 0; head < rows.num_heads; ++head) {
        attend<T>(rows, i, head, of_head.data());
        for (int64_t j = 0; j < rows.max_context; ++j) out[j] = std::max(out[j], of_head[j]);
      }
    }
  });
}

Tensor attention_rows_cpu(const Tensor& query, const Tensor& keys, const Tensor& block_table, const Tensor& context,
                          double scale, int64_t max_context, bool head_max) {
  AttentionRows rows = attention_rows(query, keys, block_table, context, scale, max_context);
  if (is_checked_mode()) check_blocks(rows);
  const Tensor out =
      head_max ? torch::stable::new_empty(query, {rows.num_rows, max_context}, ScalarType::Float)
               : torch::stable::new_empty(query, {rows.num_rows, rows.num_heads, max_context}, ScalarType::Float);
  rows.out = static_cast<float*>(out.data_ptr());
  with_float_type(query.scalar_type(), [&]<class T>(T) { head_max ? run_head_max<T>(rows) : run_per_head<T>(rows); });
  return out;
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("attention_rows", TORCH_BOX(&whipstaff::attention_rows_cpu));
}
