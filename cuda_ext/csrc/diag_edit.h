// The door of `diag_edit_`: tensors are checked here once, for both devices, and become a DiagEdit.
#pragma once

#include "checks.h"
#include "diag_edit.cuh"

namespace whipstaff {

inline DiagEdit diag_edit(const Tensor& x, const MaybeTensor& mul, const MaybeTensor& add, const Tensor& slot,
                          const MaybeTensor& gain, const MaybeTensor& residual, bool renorm) {
  check_float(x, "x");
  check_rows(x, "x");
  STD_TORCH_CHECK(mul || add, "diag_edit_ needs mul, add or both");
  const Tensor& table = mul ? *mul : *add;
  DiagEdit edit{.x = x.data_ptr(), .hidden = x.size(1), .x_stride = x.stride(0), .renorm = renorm};
  edit.slots = slots_of(slot, gain, x, table.size(0));
  if (mul) {
    check_rows(*mul, "mul");
    check_table_type(*mul, "mul", x);
    edit.num_scales = mul->size(1);
    STD_TORCH_CHECK(edit.num_scales > 0 && edit.hidden % edit.num_scales == 0, "mul has ", edit.num_scales,
                    " scales per row, which does not divide x's ", edit.hidden, " columns");
    edit.mul = mul->data_ptr();
    edit.mul_stride = mul->stride(0);
  }
  if (add) {
    check_rows(*add, "add");
    check_table_type(*add, "add", x);
    STD_TORCH_CHECK(add->size(1) == edit.hidden, "add has ", add->size(1), " columns, x has ", edit.hidden);
    edit.add = add->data_ptr();
    edit.add_stride = add->stride(0);
  }
  if (mul && add) {
    STD_TORCH_CHECK(mul->size(0) == add->size(0), "mul has ", mul->size(0), " rows, add has ", add->size(0));
    check_type(*add, "add", mul->scalar_type());
  }
  if (residual) {
    check_residual(*residual, x);
    edit.residual = residual->data_ptr();
    edit.residual_stride = residual->stride(0);
  }
  return edit;
}

}  // namespace whipstaff
