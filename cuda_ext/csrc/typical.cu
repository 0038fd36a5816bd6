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
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  with_float_type(logits.scalar_type(), [&](auto type) {
    typical_kernel<decltype(type)><<<rows, THREADS, 0, current_stream(logits)>>>(work);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("typical_rows_", TORCH_BOX(&whipstaff::typical_rows_cuda));
}
