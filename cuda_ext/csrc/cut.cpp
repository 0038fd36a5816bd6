// cut_rows_ on the CPU.
#include "cut.h"

#include <torch/csrc/stable/library.h>

#include "logit_row.h"

namespace whipstaff {
namespace {

template <class T>
void cut_row(T* logits, int64_t size, float low, float high) {
  for (int64_t i = 0; i < size; ++i) {
    const float logit = static_cast<float>(logits[i]);
    const bool is_out = (logit < low) | (logit > high);
    logits[i] = is_out ? static_cast<T>(-INFINITY) : logits[i];
  }
}

void cut_rows_cpu(const Tensor& logits, const MaybeTensor& low, const MaybeTensor& high) {
  const Cut work = cut(logits, low, high);
  with_float_type(work.logits.type, [&]<class T>(T) {
    for_rows(logits.size(0), work.vocab, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* data = static_cast<T*>(logits.data_ptr()) + row * work.logits.stride;
        cut_row(data, work.vocab, work.low_of(row), work.high_of(row));
      }
    });
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("cut_rows_", TORCH_BOX(&whipstaff::cut_rows_cpu));
}
