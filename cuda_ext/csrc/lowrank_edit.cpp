// lowrank_edit_ on the CPU: read along the directions, apply phi, write along them; the row stays in the cache.
#include "lowrank_edit.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu.h"

namespace whipstaff {
namespace {

template <class Table>
float dot(const float* __restrict h, const Table* __restrict direction, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += h[i] * static_cast<float>(direction[i]);
  return sum;
}

// One token and the low-rank block that edits it.
template <class X, class Table>
struct Token {
  const LowrankEdit& edit;
  int64_t token, row;

  X* x() const { return static_cast<X*>(edit.x) + token * edit.x_stride; }

  const Table* direction(const void* table, const int64_t (&stride)[2], int64_t r) const {
    return static_cast<const Table*>(table) + row * stride[0] + r * stride[1];
  }

  // use(begin, size) for blocks of the row's columns.
  template <class Use>
  void for_blocks(const Use& use) const {
    for (int64_t begin = 0; begin < edit.hidden; begin += BLOCK) use(begin, std::min(BLOCK, edit.hidden - begin));
  }

  void load_stream(float* h, int64_t begin, int64_t size) const {
    load(h, x() + begin, size);
    if (edit.residual)
      add_scaled(h, 1.0f, static_cast<const X*>(edit.residual) + token * edit.residual_stride + begin, size);
  }

  // z[r]: what direction r reads from the stream.
  void read(float* z) const {
    for (int64_t r = 0; r < edit.rank; ++r) z[r] = edit.bias ? edit.bias[row * edit.rank + r] : 0.0f;
    for_blocks([&](int64_t begin, int64_t size) {
      alignas(64) float h[BLOCK];
      load_stream(h, begin, size);
      for (int64_t r = 0; r < edit.rank; ++r)
        if (edit.phi_of(row, r) != Phi::Off) z[r] += dot(h, direction(edit.read, edit.read_stride, r) + begin, size);
    });
  }

  void write(const float* delta) const {
    const float gain = edit.slots.gain_of(token);
    for_blocks([&](int64_t begin, int64_t size) {
      alignas(64) float sum[BLOCK], h[BLOCK];
      std::fill_n(sum, size, 0.0f);
      for (int64_t r = 0; r < edit.rank; ++r)
        if (delta[r] != 0.0f) add_scaled(sum, delta[r], direction(edit.write, edit.write_stride, r) + begin, size);
      load(h, x() + begin, size);
      add_scaled(h, gain, sum, size);
      store(x() + begin, h, size);
    });
  }

  void run() const {
    float z[MAX_RANK], delta[MAX_RANK];
    read(z);
    for (int64_t r = 0; r < edit.rank; ++r) delta[r] = apply_phi(edit, row, r, z);
    write(delta);
  }
};

template <class X, class Table>
void run(const LowrankEdit& edit) {
  for_rows(edit.slots.num_tokens, edit.hidden * (1 + edit.rank), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = edit.slots.row(token);
      if (row >= 0) Token<X, Table>{edit, token, row}.run();
    }
  });
}

void lowrank_edit_cpu(const Tensor& x, const Tensor& read, const Tensor& write, const Tensor& phi,
                      const Tensor& phi_args, const Tensor& slot, const MaybeTensor& bias, const MaybeTensor& gain,
                      const MaybeTensor& residual) {
  const LowrankEdit edit = lowrank_edit(x, read, write, phi, phi_args, bias, slot, gain, residual);
  if (!any_edited(edit.slots)) return;
  with_float_type(x.scalar_type(), [&]<class X>(X) {
    if (read.scalar_type() == ScalarType::Float) return run<X, float>(edit);
    run<X, X>(edit);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("lowrank_edit_", TORCH_BOX(&whipstaff::lowrank_edit_cpu));
}
