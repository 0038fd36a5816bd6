// Attention probabilities of chosen query rows as pointers and sizes, and the CUDA kernels that compute them.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>

#ifdef WHIPSTAFF_KERNELS
#include "cuda.cuh"
#endif

namespace whipstaff {

struct AttentionRows {
  const void* query;           // (num_rows, num_heads, head_size)
  const void* keys;            // (num_blocks, block_size, num_kv_heads, head_size), any strides
  const int32_t* block_table;  // (num_rows, max_blocks)
  const int32_t* context;      // (num_rows,) how many keys the row sees
  float* out;                  // (num_rows, num_heads, max_context)
  int64_t num_rows, num_heads, head_size, num_blocks, block_size, num_kv_heads, max_blocks, max_context;
  int64_t query_stride[2], key_stride[4], table_stride;
  float scale;

  // No row sees more keys than there is room for in its result and its block table.
  WHIPSTAFF_HOST_DEVICE int64_t context_of(int64_t row) const {
    const int64_t room = max_blocks * block_size < max_context ? max_blocks * block_size : max_context;
    return context[row] < 0 ? 0 : context[row] < room ? context[row] : room;
  }

  // Offset of the key at a position, or -1 where the block table names no block.
  WHIPSTAFF_HOST_DEVICE int64_t key_offset(int64_t row, int64_t head, int64_t position) const {
    const int64_t block = block_table[row * table_stride + position / block_size];
    if (block < 0 || block >= num_blocks) return -1;
    const int64_t kv_head = head / (num_heads / num_kv_heads);
    return block * key_stride[0] + position % block_size * key_stride[1] + kv_head * key_stride[2];
  }
};

#ifdef WHIPSTAFF_KERNELS

// Block (row, head): one warp per key computes its score; then the block normalises the scores in place.
template <class T>
__global__ void __launch_bounds__(THREADS) attention_rows_kernel(const AttentionRows rows) {
  const int64_t row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % WARP;
  const int64_t context = rows.context_of(row);
  const T* query = static_cast<const T*>(rows.query) + row * rows.query_stride[0] + head * rows.query_stride[1];
  float* out = rows.out + (row * rows.num_heads + head) * rows.max_context;
  float best = -INFINITY;
  for (int64_t position = threadIdx.x / WARP; position < context; position += THREADS / WARP) {
    const int64_t offset = rows.key_offset(row, head, position);
    float score = 0;
    for (int64_t d = lane; offset >= 0 && d < rows.head_size; d += WARP)
      score += to_float(query[d]) * to_float(static_cast<const T*>(rows.keys)[offset + d * rows.key_stride[3]]);
    score = offset < 0 ? -INFINITY : rows.scale * warp_reduce(score, [](float a, float b) { return a + b; });
    best = fmaxf(best, score);
    if (lane == 0) out[position] = score;
  }
  best = block_reduce(best, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
  __syncthreads();
  float sum = 0;
  for (int64_t i = threadIdx.x; i < context; i += THREADS) sum += out[i] == -INFINITY ? 0.0f : expf(out[i] - best);
  sum = block_sum(sum);
  for (int64_t i = threadIdx.x; i < rows.max_context; i += THREADS)
    out[i] = i < context && out[i] != -INFINITY ? expf(out[i] - best) / sum : 0.0f;
}

// Block (row, chunk): the largest probability among the heads at each position.
__global__ inline void __launch_bounds__(THREADS) head_max_kernel(const AttentionRows rows, float* result) {
  const int64_t row = blockIdx.x, position = int64_t(blockIdx.y) * THREADS + threadIdx.x;
  if (position >= rows.max_context) return;
  float best = 0;
  for (int64_t head = 0; head < rows.num_heads; ++head)
    best = fmaxf(best, rows.out[(row * rows.num_heads + head) * rows.max_context + position]);
  result[row * rows.max_context + position] = best;
}

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
