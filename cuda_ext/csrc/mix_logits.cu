// mix_logits_ on CUDA: statistics of the streams that need them, then one pass over all streams of a row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "launch.cuh"
#include "mix_logits.h"

namespace whipstaff {
namespace {

constexpr int64_t BLOCKS_WANTED = 4096;  // enough to keep every multiprocessor busy

// One allocation, cut into the workspace's arrays; torch keeps it alive until the stream has used it.
class Workspace {
 public:
  explicit Workspace(const MixLogits& mix, const Tensor& out) : rows(mix.num_rows), cells(rows * mix.num_streams) {
    const int64_t size = take(cells * NUM_SPLITS * sizeof(Share)) + take(cells * sizeof(MixTerm)) +
                         take(cells * sizeof(float)) + take(rows * sizeof(int32_t)) + take(rows * sizeof(Share));
    memory = torch::stable::new_empty(out, {size}, ScalarType::Byte);
    char* next = static_cast<char*>(memory->data_ptr());
    const auto cut = [&](int64_t bytes) { return std::exchange(next, next + take(bytes)); };
    parts.shares = reinterpret_cast<Share*>(cut(cells * NUM_SPLITS * sizeof(Share)));
    parts.terms = reinterpret_cast<MixTerm*>(cut(cells * sizeof(MixTerm)));
    parts.constants = reinterpret_cast<float*>(cut(cells * sizeof(float)));
    parts.allowed = reinterpret_cast<int32_t*>(cut(rows * sizeof(int32_t)));
    parts.main_best = reinterpret_cast<Share*>(cut(rows * sizeof(Share)));
  }

  MixWorkspace parts{};

 private:
  static int64_t take(int64_t bytes) { return (bytes + 255) / 256 * 256; }
  int64_t rows, cells;
  MaybeTensor memory;
};

bool allows_packs(const MixLogits& mix, const Tensor& out, const std::vector<Tensor>& streams, int width) {
  const auto is_aligned = [](const Tensor& t) { return has_aligned_rows(t.data_ptr(), t.stride(0), t.element_size()); };
  return mix.vocab % width == 0 && is_aligned(out) && std::all_of(streams.begin(), streams.end(), is_aligned);
}

template <class Out, int N>
void launch_mix(const MixLogits& mix, const MixWorkspace& work, const Device& device) {
  const int64_t chunks = (mix.vocab + THREADS * N - 1) / (THREADS * N);
  const int64_t blocks = std::clamp<int64_t>(BLOCKS_WANTED / mix.num_rows, 1, chunks);
  device.launch(mix_kernel<Out, N>, {dim3(mix.num_rows, blocks)}, mix, work);
}

template <class Out>
void run(const MixLogits& mix, const MixWorkspace& work, bool wide, const Device& device) {
  const unsigned rows = mix.num_rows, streams = mix.num_streams;
  const bool has_masks = mix.alphas || mix.top_ps;
  if (has_masks || mix.log_softmax) device.launch(share_kernel, {dim3(rows, streams, NUM_SPLITS)}, mix, work);
  device.launch(term_kernel, {dim3(rows, streams)}, mix, work);
  wide ? launch_mix<Out, MIX_COLUMNS>(mix, work, device) : launch_mix<Out, 1>(mix, work, device);
  if (has_masks || mix.num_allowed)
    device.launch(rescue_kernel<Out>, {dim3((rows + THREADS - 1) / THREADS)}, mix, work);
}

void check_rows_on_device(MixLogits mix, const Device& device) {
  if (!is_checked_mode()) return;
  const std::vector<char> copy =
      device.host_copy(mix.rows, mix.num_rows * mix.num_streams * index_size(mix.rows_are_int64));
  mix.rows = copy.data();
  check_stream_rows(mix);
}

void mix_logits_cuda(const Tensor& out, const std::vector<Tensor>& streams, const Tensor& rows, const Tensor& weights,
                     const MaybeTensor& temperatures, const MaybeTensor& log_softmax, const MaybeTensor& alphas,
                     const MaybeTensor& top_ps, const MaybeTensor& num_allowed) {
  const MixLogits mix = mix_logits(out, streams, rows, weights, temperatures, log_softmax, alphas, top_ps, num_allowed);
  if (mix.num_rows == 0 || mix.vocab == 0) return;
  const Device device(out);
  check_rows_on_device(mix, device);
  const Workspace work(mix, out);
  const bool wide = allows_packs(mix, out, streams, MIX_COLUMNS);
  with_float_type(out.scalar_type(), [&](auto type) { run<decltype(type)>(mix, work.parts, wide, device); });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) {
  library.impl("mix_logits_", TORCH_BOX(&whipstaff::mix_logits_cuda));
}
