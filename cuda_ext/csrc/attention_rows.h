// The door of `attention_rows`: tensors are checked here once, for both devices, and become an AttentionRows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "attention_rows.cuh"
#include "checks.h"

namespace whipstaff {

inline void check_num_dimensions(const Tensor& tensor, const char* name, int64_t wanted) {
  STD_TORCH_CHECK(tensor.dim() == wanted, name, " must have ", wanted, " dimensions, not shape ", shape_of(tensor));
}

inline void check_dimensions(const Tensor& tensor, const char* name, int64_t wanted) {
  check_num_dimensions(tensor, name, wanted);
  STD_TORCH_CHECK(wanted == 0 || tensor.size(wanted - 1) <= 1 || tensor.stride(wanted - 1) == 1, name,
                  " must be contiguous in its last dimension, not stride ", tensor.stride(wanted - 1));
}

inline AttentionRows attention_rows(const Tensor& query, const Tensor& keys, const Tensor& block_table,
                                    const Tensor& context, double scale, int64_t max_context) {
  check_float(query, "query");
  check_dimensions(query, "query", 3);
  check_num_dimensions(keys, "keys", 4);
  check_dimensions(block_table, "block_table", 2);
  check_type(keys, "keys", query.scalar_type());
  check_type(block_table, "block_table", ScalarType::Int);
  check_type(context, "context", ScalarType::Int);
  check_per_token(context, "context", query.size(0));
  for (const auto& [tensor, name] : {std::pair{&keys, "keys"}, {&block_table, "block_table"}, {&context, "context"}})
    check_same_device(*tensor, name, "query", query);
  STD_TORCH_CHECK(keys.size(1) > 0, "keys have blocks of size 0");
  STD_TORCH_CHECK(keys.size(3) == query.size(2), "keys have head size ", keys.size(3), ", query has ", query.size(2));
  STD_TORCH_CHECK(keys.size(2) > 0 && query.size(1) % keys.size(2) == 0, "keys have ", keys.size(2),
                  " heads, which do not divide query's ", query.size(1));
  STD_TORCH_CHECK(block_table.size(0) >= query.size(0), "block_table has ", block_table.size(0), " entries for ",
                  query.size(0), " rows");
  STD_TORCH_CHECK(max_context >= 0, "max_context must not be negative, it is ", max_context);
  return {.query = query.data_ptr(),
          .keys = keys.data_ptr(),
          .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
          .context = static_cast<const int32_t*>(context.data_ptr()),
          .num_rows = query.size(0),
          .num_heads = query.size(1),
          .head_size = query.size(2),
          .num_blocks = keys.size(0),
          .block_size = keys.size(1),
          .num_kv_heads = keys.size(2),
          .max_blocks = block_table.size(1),
          .max_context = max_context,
          .query_stride = {query.stride(0), query.stride(1)},
          .key_stride = {keys.stride(0), keys.stride(1), keys.stride(2), keys.stride(3)},
          .table_stride = block_table.stride(0),
          .scale = static_cast<float>(scale)};
}

// Checked mode: `rows` with its context and block table in host memory.
inline void check_blocks(const AttentionRows& rows) {
  for (int64_t row = 0; row < rows.num_rows; ++row)
    for (int64_t i = 0; i * rows.block_size < rows.context_of(row); ++i) {
      const int32_t block = rows.block_table[row * rows.table_stride + i];
      STD_TORCH_CHECK(block >= 0 && block < rows.num_blocks, "block_table[", row, ", ", i, "] is ", block,
                      ", keys have ", rows.num_blocks, " blocks");
    }
}

}  // namespace whipstaff
