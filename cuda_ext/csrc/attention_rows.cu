// attention_rows on CUDA: one block per query row and head, then the maximum over heads where that is wanted.
#include <torch/csrc/stable/library.h>

#include "attention_rows.h"
#include "launch.cuh"

namespace whipstaff {
namespace {

void check_blocks_on_device(AttentionRows rows, const Device& device) {
  if (!is_checked_mode()) return;
  const size_t table_size = rows.num_rows ? (rows.num_rows - 1) * rows.table_stride + rows.max_blocks : 0;
  const std::vector<char> table = device.host_copy(rows.block_table, table_size * sizeof(int32_t));
  const std::vector<char> context = device.host_copy(rows.context, rows.num_rows * sizeof(int32_t));
  rows.block_table = reinterpret_cast<const int32_t*>(table.data());
  rows.context = reinterpret_cast<const int32_t*>(context.data());
  check_blocks(rows);
}

Tensor head_max_of(const AttentionRows& rows, const Tensor& query, const Device& device) {
  const Tensor result = torch::stable::new_empty(query, {rows.num_rows, rows.max_context}, ScalarType::Float);
  const unsigned chunks = (rows.max_context + THREADS - 1) / THREADS;
  device.launch(head_max_kernel, {dim3(rows.num_rows, chunks)}, rows, static_cast<float*>(result.data_ptr()));
  return result;
}

Tensor attention_rows_cuda(const Tensor& query, const Tensor& keys, const Tensor& block_table, const Tensor& context,
                           double scale, int64_t max_context, bool head_max) {
  AttentionRows rows = attention_rows(query, keys, block_table, context, scale, max_context);
  const Device device(query);
  check_blocks_on_device(rows, device);
  const Tensor out = torch::stable::new_empty(query, {rows.num_rows, rows.num_heads, max_context}, ScalarType::Float);
  rows.out = static_cast<float*>(out.data_ptr());
  const bool is_empty = rows.num_rows * rows.num_heads * max_context == 0;
  if (!is_empty) {
    with_float_type(query.scalar_type(), [&](auto type) {
      device.launch(attention_rows_kernel<decltype(type)>, {dim3(rows.num_rows, rows.num_heads)}, rows);
    });
  }
  if (!head_max) return out;
  if (is_empty) return torch::stable::new_zeros(query, {rows.num_rows, max_context}, ScalarType::Float);
  return head_max_of(rows, query, device);
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("attention_rows", TORCH_BOX(&whipstaff::attention_rows_cuda));
}
