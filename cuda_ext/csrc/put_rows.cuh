// Rows that take the place of some of a batch's rows as pointers and sizes, and the CUDA kernel that copies them.
#pragma once

#include "host_device.h"

#include <cstdint>

#ifdef WHIPSTAFF_KERNELS
#include "cuda.cuh"
#endif

namespace whipstaff {

struct PutRows {
  char* x;               // (num_tokens, row_size) bytes
  const char* rows;      // (num_rows, row_size) bytes
  const int32_t* index;  // (num_tokens,) a row for each token; anything outside [0, num_rows) leaves the token alone
  int64_t num_tokens, num_rows;
  int64_t row_size, x_stride, rows_stride;  // in bytes

  WHIPSTAFF_HOST_DEVICE const char* row_for(int64_t token) const {
    const int32_t row = index[token];
    return row >= 0 && row < num_rows ? rows + row * rows_stride : nullptr;
  }
};

#ifdef WHIPSTAFF_KERNELS

// Block t copies what token t gets, Word by Word.
template <class Word>
__global__ void __launch_bounds__(THREADS) put_rows_kernel(const PutRows work) {
  const Word* row = reinterpret_cast<const Word*>(work.row_for(blockIdx.x));
  if (!row) return;
  Word* target = reinterpret_cast<Word*>(work.x + blockIdx.x * work.x_stride);
  for (int64_t i = threadIdx.x; i < work.row_size / int64_t(sizeof(Word)); i += THREADS) target[i] = row[i];
}

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
