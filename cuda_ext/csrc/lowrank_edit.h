// The door of `lowrank_edit_`: tensors are checked here once, for both devices, and become a LowrankEdit.
#pragma once

#include "checks.h"
#include "lowrank_edit.cuh"

namespace whipstaff {

// (num_slots, rank, hidden) of x's type or float32; the directions may lie any distance apart.
inline void check_directions(const Tensor& table, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(table.dim() == 3, name, " must have 3 dimensions, not shape ", shape_of(table));
  STD_TORCH_CHECK(table.size(2) == x.size(1), name, " has ", table.size(2), " columns, x has ", x.size(1));
  STD_TORCH_CHECK(table.size(2) <= 1 || table.stride(2) == 1, name,
                  " must be contiguous in its last dimension, not stride ", table.stride(2));
  check_table_type(table, name, x);
}

// A contiguous table of `type` with one entry, or `extra` of them, for each direction of each slot.
inline const void* per_direction(const Tensor& table, const char* name, ScalarType type, const Tensor& read,
                                 int64_t extra) {
  check_type(table, name, type);
  check_same_device(table, name, "x", read);
  const bool fits = table.dim() == (extra ? 3 : 2) && table.size(0) == read.size(0) && table.size(1) == read.size(1) &&
                    (!extra || table.size(2) == extra);
  STD_TORCH_CHECK(fits, name, " has shape ", shape_of(table), " for ", read.size(0), " slots of ", read.size(1),
                  " directions", extra ? " with 4 arguments each" : "");
  STD_TORCH_CHECK(table.is_contiguous(), name, " must be contiguous");
  return table.data_ptr();
}

inline LowrankEdit lowrank_edit(const Tensor& x, const Tensor& read, const Tensor& write, const Tensor& phi,
                                const Tensor& phi_args, const MaybeTensor& bias, const Tensor& slot,
                                const MaybeTensor& gain, const MaybeTensor& residual) {
  check_float(x, "x");
  check_rows(x, "x");
  check_directions(read, "read", x);
  check_directions(write, "write", x);
  check_type(write, "write", read.scalar_type());
  STD_TORCH_CHECK(read.size(1) <= MAX_RANK, "read has rank ", read.size(1), ", at most ", MAX_RANK, " is supported");
  STD_TORCH_CHECK(read.size(0) == write.size(0) && read.size(1) == write.size(1), "read has shape ", shape_of(read),
                  ", write has ", shape_of(write));
  if (residual) check_residual(*residual, x);
  return {
      .x = x.data_ptr(),
      .residual = residual ? residual->data_ptr() : nullptr,
      .read = read.data_ptr(),
      .write = write.data_ptr(),
      .bias = bias ? static_cast<const float*>(per_direction(*bias, "bias", ScalarType::Float, read, 0)) : nullptr,
      .phi = static_cast<const int32_t*>(per_direction(phi, "phi", ScalarType::Int, read, 0)),
      .phi_args = static_cast<const float*>(per_direction(phi_args, "phi_args", ScalarType::Float, read, NUM_PHI_ARGS)),
      .slots = slots_of(slot, gain, x, read.size(0)),
      .hidden = x.size(1),
      .rank = read.size(1),
      .x_stride = x.stride(0),
      .residual_stride = residual ? residual->stride(0) : 0,
      .read_stride = {read.stride(0), read.stride(1)},
      .write_stride = {write.stride(0), write.stride(1)}};
}

}  // namespace whipstaff
