// typical_rows_ on CUDA: one block per row.
#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "typical.h"

namespace whipstaff {
namespace {

void typical_rows_cuda(const Tensor& logits, const Tensor& mass) {
  const Typical work = typical(logits, mass);
  const unsigned rows = logits.size(0);
  if (rows == 0 || work.vocab == 0) return;
  const Device device(logits);
  with_float_type(logits.scalar_type(), [&](auto type) {
    device.launch(typical_kernel<decltype(type)>, {dim3(rows)}, work);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("typical_rows_", TORCH_BOX(&whipstaff::typical_rows_cuda));
}
