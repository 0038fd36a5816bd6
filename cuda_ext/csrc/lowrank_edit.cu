// lowrank_edit_ on CUDA: one launch reads along the directions, a second applies phi and writes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "launch.cuh"
#include "lowrank_edit.h"

namespace whipstaff {
namespace {

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class X, class Table, int N>
void launch(const LowrankEdit& edit, float* z, cudaStream_t stream) {
  const unsigned tokens = edit.slots.num_tokens;
  read_kernel<X, Table, N><<<dim3(tokens, blocks_for(edit.rank, DIRECTIONS)), THREADS, 0, stream>>>(edit, z);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  write_kernel<X, Table, N><<<dim3(tokens, blocks_for(edit.hidden, THREADS * N)), THREADS, 0, stream>>>(edit, z);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class X, class Table>
bool allows_packs(const LowrankEdit& edit, int64_t width) {
  const auto is_aligned = [](const void* table, const int64_t (&stride)[2]) {
    return has_aligned_rows(table, stride[0], sizeof(Table)) && has_aligned_rows(table, stride[1], sizeof(Table));
  };
  return edit.hidden % width == 0 && has_aligned_rows(edit.x, edit.x_stride, sizeof(X)) &&
         has_aligned_rows(edit.residual, edit.residual_stride, sizeof(X)) && is_aligned(edit.read, edit.read_stride) &&
         is_aligned(edit.write, edit.write_stride);
}

template <class X, class Table>
void run(const LowrankEdit& edit, float* z, cudaStream_t stream) {
  constexpr int WIDE = 4;
  if (allows_packs<X, Table>(edit, WIDE)) return launch<X, Table, WIDE>(edit, z, stream);
  launch<X, Table, 1>(edit, z, stream);
}

void lowrank_edit_cuda(const Tensor& x, const Tensor& read, const Tensor& write, const Tensor& phi,
                       const Tensor& phi_args, const Tensor& slot, const MaybeTensor& bias, const MaybeTensor& gain,
                       const MaybeTensor& residual) {
  const LowrankEdit edit = lowrank_edit(x, read, write, phi, phi_args, bias, slot, gain, residual);
  if (edit.slots.num_tokens == 0 || edit.hidden == 0 || edit.rank == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  check_slots_on_device(edit.slots, stream);
  const Tensor z = torch::stable::new_empty(x, {edit.slots.num_tokens, edit.rank}, ScalarType::Float);
  with_float_type(x.scalar_type(), [&](auto type) {
    using X = decltype(type);
    float* readings = static_cast<float*>(z.data_ptr());
    if (read.scalar_type() == ScalarType::Float) return run<X, float>(edit, readings, stream);
    run<X, X>(edit, readings, stream);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("lowrank_edit_", TORCH_BOX(&whipstaff::lowrank_edit_cuda));
}
