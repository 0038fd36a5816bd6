// put_rows_ on the CPU.
#include "put_rows.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

namespace whipstaff {
namespace {

void put_rows_cpu(const Tensor& x, const Tensor& rows, const Tensor& index) {
  const PutRows work = put_rows(x, rows, index);
  if (is_checked_mode()) check_index(work);
  if (work.row_size == 0) return;  // of no columns there may be no memory either
  for (int64_t token = 0; token < work.num_tokens; ++token)
    if (const char* row = work.row_for(token)) std::memcpy(work.x + token * work.x_stride, row, work.row_size);
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) { library.impl("put_rows_", TORCH_BOX(&whipstaff::put_rows_cpu)); }
