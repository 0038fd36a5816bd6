// apply_temperature_, explain_rows and divergences on CUDA: one block per row.
#include <torch/csrc/stable/library.h>

#include "explain.h"
#include "launch.cuh"

namespace whipstaff {
namespace {

void apply_temperature_cuda(const Tensor& logits, const Tensor& temperature) {
  check_rows(logits, "logits");
  const Temper work = temper(logits, temperature);
  const unsigned rows = logits.size(0);
  if (rows == 0 || work.vocab == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  with_float_type(logits.scalar_type(), [&](auto type) {
    temper_kernel<decltype(type)><<<rows, THREADS, 0, current_stream(logits)>>>(work);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Explanation explain_rows_cuda(const Tensor& final, const MaybeTensor& base) {
  const torch::stable::accelerator::DeviceGuard guard(final.get_device_index());
  const Explanation results = new_explanation(final);
  const Explain work = explain(final, base, results);
  if (work.num_rows == 0 || work.vocab == 0) return results;
  explain_kernel<<<static_cast<unsigned>(work.num_rows), THREADS, 0, current_stream(final)>>>(work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

Tensor divergences_cuda(const Tensor& mature, const Tensor& early, const Tensor& owners) {
  const torch::stable::accelerator::DeviceGuard guard(mature.get_device_index());
  const Tensor result = new_divergences(mature, early);
  const Divergences work = divergences(mature, early, owners, result);
  if (work.num_early == 0 || work.vocab == 0) return result;
  divergence_kernel<<<static_cast<unsigned>(work.num_early), THREADS, 0, current_stream(mature)>>>(work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("apply_temperature_", TORCH_BOX(&whipstaff::apply_temperature_cuda));
  library.impl("explain_rows", TORCH_BOX(&whipstaff::explain_rows_cuda));
  library.impl("divergences", TORCH_BOX(&whipstaff::divergences_cuda));
}
