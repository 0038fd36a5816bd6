// diag_edit_ on CUDA: one launch, whose blocks leave at once where a token is not edited.
#include <torch/csrc/stable/library.h>

#include "diag_edit.h"
#include "launch.cuh"

namespace whipstaff {
namespace {

template <class X, class Table, int N>
void launch(const DiagEdit& edit, cudaStream_t stream) {
  const unsigned chunks = (edit.hidden + THREADS * N - 1) / (THREADS * N);
  const dim3 tokens(edit.slots.num_tokens), grid(edit.slots.num_tokens, chunks);
  if (edit.renorm)
    diag_edit_kernel<X, Table, N, true><<<tokens, THREADS, 0, stream>>>(edit);
  else
    diag_edit_kernel<X, Table, N, false><<<grid, THREADS, 0, stream>>>(edit);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class X, class Table>
bool allows_packs(const DiagEdit& edit, int64_t width) {
  const bool is_grouped = edit.mul && edit.num_scales != edit.hidden;
  const int64_t group = is_grouped ? edit.hidden / edit.num_scales : edit.hidden;
  return group % width == 0 && has_aligned_rows(edit.x, edit.x_stride, sizeof(X)) &&
         has_aligned_rows(edit.residual, edit.residual_stride, sizeof(X)) &&
         (is_grouped || has_aligned_rows(edit.mul, edit.mul_stride, sizeof(Table))) &&
         has_aligned_rows(edit.add, edit.add_stride, sizeof(Table));
}

template <class X, class Table>
void run(const DiagEdit& edit, cudaStream_t stream) {
  constexpr int WIDE = 16 / sizeof(X);
  if (allows_packs<X, Table>(edit, WIDE)) return launch<X, Table, WIDE>(edit, stream);
  launch<X, Table, 1>(edit, stream);
}

void diag_edit_cuda(const Tensor& x, const MaybeTensor& mul, const MaybeTensor& add, const Tensor& slot,
                    const MaybeTensor& gain, const MaybeTensor& residual, bool renorm) {
  const DiagEdit edit = diag_edit(x, mul, add, slot, gain, residual, renorm);
  if (edit.slots.num_tokens == 0 || edit.hidden == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  check_slots_on_device(edit.slots, stream);
  with_float_type(x.scalar_type(), [&](auto type) {
    using X = decltype(type);
    if ((mul ? *mul : *add).scalar_type() == ScalarType::Float) return run<X, float>(edit, stream);
    run<X, X>(edit, stream);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("diag_edit_", TORCH_BOX(&whipstaff::diag_edit_cuda));
}
