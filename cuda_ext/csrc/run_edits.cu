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
void ask_for_shared(const Device& device, Kernel* kernel, int64_t bytes, const RunEdits& edits) {
  if (bytes <= ALWAYS_SHARED) return;
  const int64_t available = device.max_shared();
  STD_TORCH_CHECK(bytes + FOR_REDUCTIONS <= available, "x has ", edits.width, " columns, for which a block needs ",
                  bytes, " bytes of shared memory; this device has ", available);
  device.ask_for_shared(kernel, bytes);
}

template <class X, int N>
void launch(const Device& device, const RunEdits& edits, unsigned num_blocks, float* room) {
  const size_t bytes = shared_floats(edits) * sizeof(float);
  ask_for_shared(device, run_edits_kernel<X, N>, bytes, edits);
  device.launch(run_edits_kernel<X, N>, {dim3(num_blocks), bytes}, edits, room);
}

template <class X>
bool allows_packs(const RunEdits& edits, int64_t width) {
  return edits.width % width == 0 && has_aligned_rows(edits.x, edits.x_stride, sizeof(X)) &&
         has_aligned_rows(edits.residual, edits.residual_stride, sizeof(X)) &&
         has_aligned_rows(edits.lines, edits.line_stride, sizeof(float)) &&
         has_aligned_rows(edits.encoder, edits.encoder_stride, sizeof(float)) &&
         has_aligned_rows(edits.kept, edits.kept_stride, sizeof(X));
}

void check_programs_on_device(RunEdits edits, const Device& device) {
  if (!is_checked_mode()) return;
  const int64_t num_entries = (edits.num_tokens - 1) * edits.token_stride + 2 + edits.num_conditions;
  const std::vector<char> tokens = device.host_copy(edits.tokens, num_entries * sizeof(int32_t));
  const std::vector<char> code = device.host_copy(edits.code, edits.num_instructions * sizeof(Instruction));
  edits.tokens = reinterpret_cast<const int32_t*>(tokens.data());
  edits.code = reinterpret_cast<const Instruction*>(code.data());
  check_programs(edits);
}

void run_on_cuda(const Tensor& x, const RunEdits& edits) {
  if (edits.num_tokens == 0 || edits.width == 0) return;
  const Device device(x);
  check_programs_on_device(edits, device);
  const int64_t num_blocks = std::min(edits.num_tokens, edits.encoder ? MAX_READERS : MAX_BLOCKS);
  const int64_t per_block = edits.width + edits.num_features;
  const Tensor scratch = torch::stable::new_empty(x, {num_blocks, per_block}, ScalarType::Float);
  with_float_type(x.scalar_type(), [&](auto type) {
    using X = decltype(type);
    float* room = static_cast<float*>(scratch.data_ptr());
    if (allows_packs<X>(edits, 4)) return launch<X, 4>(device, edits, num_blocks, room);
    launch<X, 1>(device, edits, num_blocks, room);
  });
}

void run_edits_cuda(const Tensor& x, const Tensor& lines, const Tensor& code, const Tensor& args, const Tensor& tokens,
                    const Tensor& gains, const Tensor& history, const MaybeTensor& residual, const MaybeTensor& meter,
                    const MaybeTensor& encoder, const MaybeTensor& encoder_bias, const MaybeTensor& kept) {
  const BoundEdits bound =
      bind_edits(lines, code, args, tokens, gains, history, meter, encoder, encoder_bias, kept);
  run_on_cuda(x, bound.on(x, residual));
}

void run_bound_edits_cuda(const Tensor& x, const MaybeTensor& residual, const Tensor& bound, int64_t site) {
  run_on_cuda(x, BoundEdits::at(bound, site).on(x, residual));
}

void bind_edits_cuda(const Tensor& bound, int64_t site, const Tensor& lines, const Tensor& code, const Tensor& args,
                     const Tensor& tokens, const Tensor& gains, const Tensor& history, const MaybeTensor& meter,
                     const MaybeTensor& encoder, const MaybeTensor& encoder_bias, const MaybeTensor& kept) {
  BoundEdits::room(bound, site) =
      bind_edits(lines, code, args, tokens, gains, history, meter, encoder, encoder_bias, kept);
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("run_edits_", TORCH_BOX(&whipstaff::run_edits_cuda));
  library.impl("bind_edits_", TORCH_BOX(&whipstaff::bind_edits_cuda));
  library.impl("run_bound_edits_", TORCH_BOX(&whipstaff::run_bound_edits_cuda));
}
