// cut_rows_ on CUDA: one block per row.
#include "cut.h"

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace whipstaff {
namespace {

void cut_rows_cuda(const Tensor& logits, const MaybeTensor& low, const MaybeTensor& high) {
  const Cut work = cut(logits, low, high);
  const unsigned rows = logits.size(0);
  if (rows == 0 || work.vocab == 0) return;
  const Device device(logits);
  with_float_type(logits.scalar_type(), [&](auto type) {
    device.launch(cut_kernel<decltype(type)>, {dim3(rows)}, work);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("cut_rows_", TORCH_BOX(&whipstaff::cut_rows_cuda));
}
