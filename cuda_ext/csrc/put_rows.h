// The door of `put_rows_`: tensors are checked here once, for both devices, and become a PutRows.
#pragma once

#include "checks.h"
#include "put_rows.cuh"

namespace whipstaff {

inline PutRows put_rows(const Tensor& x, const Tensor& rows, const Tensor& index) {
  check_float(x, "x");
  check_rows(x, "x");
  check_rows(rows, "rows");
  check_type(rows, "rows", x.scalar_type());
  check_same_device(rows, "rows", "x", x);
  STD_TORCH_CHECK(rows.size(1) == x.size(1), "rows has ", rows.size(1), " columns, x has ", x.size(1));
  check_type(index, "index", ScalarType::Int);
  check_per_token(index, "index", x.size(0));
  check_same_device(index, "index", "x", x);
  const int64_t size = x.element_size();
  return {.x = static_cast<char*>(x.data_ptr()),
          .rows = static_cast<const char*>(rows.data_ptr()),
          .index = static_cast<const int32_t*>(index.data_ptr()),
          .num_tokens = x.size(0),
          .num_rows = rows.size(0),
          .row_size = x.size(1) * size,
          .x_stride = x.stride(0) * size,
          .rows_stride = rows.stride(0) * size};
}

// `work` with its index in host memory.
inline void check_index(const PutRows& work) {
  for (int64_t token = 0; token < work.num_tokens; ++token)
    STD_TORCH_CHECK(work.index[token] < work.num_rows, "index[", token, "] is ", work.index[token], ", rows has ",
                    work.num_rows, " rows");
}

}  // namespace whipstaff
