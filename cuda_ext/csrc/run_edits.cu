// run_edits_ on CUDA: one launch, one block per token with its row in shared memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "launch.cuh"
#include "run_edits.h"

namespace whipstaff {
namespace {

constexpr int64_t FOR_REDUCTIONS = 1024;  // at most: bytes of shared memory that sums over a block take
constexpr int64_t ALWAYS_SHARED = 48 * 1024 - FOR_REDUCTIONS;  // bytes that every block may have beside them
constexpr int64_t MAX_BLOCKS = 1024;  // each has room of its own for a second row; about what a GPU runs at once
constexpr int64_t MAX_READERS = 512;  // the same where they have room for an encoder's readings too

// Wide rows need more shared memory than a block gets unasked.
template <class Kernel>
void ask_for_shared(Kernel* kernel, int64_t bytes, const RunEdits& edits) {
  if (bytes <= ALWAYS_SHARED) return;
  int device = 0, available = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(bytes + FOR_REDUCTIONS <= available, "x has ", edits.width, " columns, for which a block needs ",
                  bytes, " bytes of shared memory; this device has ", available);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <class X, int N>
void launch(const RunEdits& edits, unsigned num_blocks, float* room, cudaStream_t stream) {
  const int64_t bytes = shared_floats(edits) * sizeof(float);
  ask_for_shared(run_edits_kernel<X, N>, bytes, edits);
  run_edits_kernel<X, N><<<num_blocks, THREADS, bytes, stream>>>(edits, room);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class X>
bool allows_packs(const RunEdits& edits, int64_t width) {
  return edits.width % width == 0 && has_aligned_rows(edits.x, edits.x_stride, sizeof(X)) &&
         has_aligned_rows(edits.residual, edits.residual_stride, sizeof(X)) &&
         has_aligned_rows(edits.lines, edits.line_stride, sizeof(float)) &&
         has_aligned_rows(edits.encoder, edits.encoder_stride, sizeof(float)) &&
         has_aligned_rows(edits.kept, edits.kept_stride, sizeof(X));
}

void check_programs_on_device(RunEdits edits, cudaStream_t stream) {
  if (!is_checked_mode()) return;
  const int64_t num_entries = (edits.num_tokens - 1) * edits.token_stride + 2 + edits.num_conditions;
  const std::vector<char> tokens = host_copy(edits.tokens, num_entries * sizeof(int32_t), stream);
  const std::vector<char> code = host_copy(edits.code, edits.num_instructions * sizeof(Instruction), stream);
  edits.tokens = reinterpret_cast<const int32_t*>(tokens.data());
  edits.code = reinterpret_cast<const Instruction*>(code.data());
  check_programs(edits);
}

void run_edits_cuda(const Tensor& x, const Tensor& lines, const Tensor& code, const Tensor& args, const Tensor& tokens,
                    const Tensor& gains, const Tensor& history, const MaybeTensor& residual, const MaybeTensor& meter,
                    const MaybeTensor& encoder, const MaybeTensor& encoder_bias, const MaybeTensor& kept) {
  const RunEdits edits =
      run_edits(x, lines, code, args, tokens, gains, history, residual, meter, encoder, encoder_bias, kept);
  if (edits.num_tokens == 0 || edits.width == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  check_programs_on_device(edits, stream);
  const int64_t num_blocks = std::min(edits.num_tokens, encoder ? MAX_READERS : MAX_BLOCKS);
  const int64_t per_block = edits.width + edits.num_features;
  const Tensor scratch = torch::stable::new_empty(x, {num_blocks, per_block}, ScalarType::Float);
  with_float_type(x.scalar_type(), [&](auto type) {
    using X = decltype(type);
    float* room = static_cast<float*>(scratch.data_ptr());
    if (allows_packs<X>(edits, 4)) return launch<X, 4>(edits, num_blocks, room, stream);
    launch<X, 1>(edits, num_blocks, room, stream);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("run_edits_", TORCH_BOX(&whipstaff::run_edits_cuda));
}
