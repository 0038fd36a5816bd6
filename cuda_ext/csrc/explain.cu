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
  const Device device(logits);
  with_float_type(logits.scalar_type(), [&](auto type) {
    device.launch(temper_kernel<decltype(type)>, {dim3(rows)}, work);
  });
}

Explanation explain_rows_cuda(const Tensor& final, const MaybeTensor& base) {
  const Device device(final);
  const Explanation results = new_explanation(final);
  const Explain work = explain(final, base, results);
  if (work.num_rows == 0 || work.vocab == 0) return results;
  device.launch(explain_kernel, {dim3(work.num_rows)}, work);
  return results;
}

Tensor divergences_cuda(const Tensor& mature, const Tensor& early, const Tensor& owners) {
  const Device device(mature);
  const Tensor result = new_divergences(mature, early);
  const Divergences work = divergences(mature, early, owners, result);
  if (work.num_early == 0 || work.vocab == 0) return result;
  device.launch(divergence_kernel, {dim3(work.num_early)}, work);
  return result;
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("apply_temperature_", TORCH_BOX(&whipstaff::apply_temperature_cuda));
  library.impl("explain_rows", TORCH_BOX(&whipstaff::explain_rows_cuda));
  library.impl("divergences", TORCH_BOX(&whipstaff::divergences_cuda));
}
