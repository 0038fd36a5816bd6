// put_rows_ on CUDA: one launch, whose blocks leave at once where a token gets no row.
#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "put_rows.h"

namespace whipstaff {
namespace {

using Wide = Pack<uint32_t, 4>;
using Narrow = uint16_t;  // every float type is made of these

void check_index_on_device(PutRows work, const Device& device) {
  if (!is_checked_mode()) return;
  const std::vector<char> index = device.host_copy(work.index, work.num_tokens * sizeof(int32_t));
  work.index = reinterpret_cast<const int32_t*>(index.data());
  check_index(work);
}

void put_rows_cuda(const Tensor& x, const Tensor& rows, const Tensor& index) {
  const PutRows work = put_rows(x, rows, index);
  if (work.num_tokens == 0 || work.row_size == 0) return;
  const Device device(x);
  check_index_on_device(work, device);
  const bool is_wide = work.row_size % sizeof(Wide) == 0 && has_aligned_rows(work.x, work.x_stride, 1) &&
                       has_aligned_rows(work.rows, work.rows_stride, 1);
  const Grid grid{dim3(work.num_tokens)};
  is_wide ? device.launch(put_rows_kernel<Wide>, grid, work) : device.launch(put_rows_kernel<Narrow>, grid, work);
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CUDA, library) { library.impl("put_rows_", TORCH_BOX(&whipstaff::put_rows_cuda)); }
