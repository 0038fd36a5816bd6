// The door of `mix_logits_`: tensors are checked here once, for both devices, and become a MixLogits.
#pragma once

#include <vector>

#include "logits.h"
#include "mix_logits.cuh"

namespace whipstaff {

// A contiguous (num_rows, num_streams) table of `type`; persistent buffers may hold more rows.
inline const void* table_of(const MaybeTensor& table, const char* name, ScalarType type, const Tensor& out,
                            int num_streams) {
  if (!table) return nullptr;
  check_type(*table, name, type);
  check_same_device(*table, name, "out", out);
  const bool fits = table->dim() == 2 && table->size(0) >= out.size(0) && table->size(1) == num_streams;
  STD_TORCH_CHECK(fits, name, " has shape ", shape_of(*table), " for ", out.size(0), " rows and ", num_streams,
                  " streams");
  STD_TORCH_CHECK(table->is_contiguous(), name, " must be contiguous");
  return table->data_ptr();
}

inline MixLogits mix_logits(const Tensor& out, const std::vector<Tensor>& streams, const Tensor& rows,
                            const Tensor& weights, const MaybeTensor& temperatures, const MaybeTensor& log_softmax,
                            const MaybeTensor& alphas, const MaybeTensor& top_ps, const MaybeTensor& num_allowed) {
  check_rows(out, "out");
  const int num_streams = static_cast<int>(streams.size());
  STD_TORCH_CHECK(num_streams >= 1 && num_streams <= MAX_STREAMS, "mix_logits_ takes 1 to ", MAX_STREAMS,
                  " streams, not ", num_streams);
  STD_TORCH_CHECK(is_index_type(rows.scalar_type()), "rows must be int32 or int64, not ", toString(rows.scalar_type()));
  const auto table = [&](const MaybeTensor& tensor, const char* name) {
    return static_cast<const float*>(table_of(tensor, name, ScalarType::Float, out, num_streams));
  };
  MixLogits mix{.out = out.data_ptr(),
                .num_rows = out.size(0),
                .vocab = out.size(1),
                .out_stride = out.stride(0),
                .out_type = float_type(out, "out"),
                .num_streams = num_streams,
                .rows = table_of(rows, "rows", rows.scalar_type(), out, num_streams),
                .rows_are_int64 = rows.scalar_type() == ScalarType::Long,
                .weights = table(weights, "weights"),
                .temperatures = table(temperatures, "temperatures"),
                .alphas = table(alphas, "alphas"),
                .top_ps = table(top_ps, "top_ps")};
  mix.log_softmax = static_cast<const bool*>(table_of(log_softmax, "log_softmax", ScalarType::Bool, out, num_streams));
  for (int k = 0; k < num_streams; ++k)
    mix.stream[k] = stream_of(streams[k], "streams[" + std::to_string(k) + "]", out, "out");
  if (num_allowed) {
    check_type(*num_allowed, "num_allowed", ScalarType::Int);
    check_per_token(*num_allowed, "num_allowed", out.size(0));
    check_same_device(*num_allowed, "num_allowed", "out", out);
    mix.num_allowed = static_cast<int32_t*>(num_allowed->data_ptr());
  }
  return mix;
}

// `mix` with its row numbers in host memory.
inline void check_stream_rows(const MixLogits& mix) {
  for (int64_t row = 0; row < mix.num_rows; ++row)
    for (int k = 0; k < mix.num_streams; ++k)
      STD_TORCH_CHECK(mix.raw_row(row, k) < mix.stream[k].num_rows, "rows[", row, ", ", k, "] is ", mix.raw_row(row, k),
                      ", streams[", k, "] has ", mix.stream[k].num_rows, " rows");
}

}  // namespace whipstaff
