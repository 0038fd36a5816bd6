// diag_edit_ on the CPU: rows pass through the cache in blocks of float32.
#include "diag_edit.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "cpu.h"

namespace whipstaff {
namespace {

template <class Table>
void scale(float* __restrict y, const Table* __restrict mul, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] *= static_cast<float>(mul[i]);
}

template <class Table>
void shift(float* __restrict y, const Table* __restrict add, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] += static_cast<float>(add[i]);
}

// One scale for each group of `width` columns; the block begins at column `begin`.
template <class Table>
void scale_groups(float* y, const Table* mul, int64_t width, int64_t begin, int64_t size) {
  for (int64_t i = 0; i < size;) {
    const int64_t group = (begin + i) / width;
    const int64_t stop = std::min(size, (group + 1) * width - begin);
    const float factor = static_cast<float>(mul[group]);
    for (; i < stop; ++i) y[i] *= factor;
  }
}

inline void blend(float* __restrict y, const float* __restrict h, float gain, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = h[i] + gain * (y[i] - h[i]);
}

// One token's row and the table rows that edit it.
template <class X, class Table>
struct Row {
  X* x;
  X* residual;
  const Table *mul, *add;
  float gain;
  int64_t hidden, num_scales;

  Row(const DiagEdit& edit, int64_t token, int64_t row)
      : x(static_cast<X*>(edit.x) + token * edit.x_stride),
        residual(edit.residual ? static_cast<X*>(edit.residual) + token * edit.residual_stride : nullptr),
        mul(edit.mul ? static_cast<const Table*>(edit.mul) + row * edit.mul_stride : nullptr),
        add(edit.add ? static_cast<const Table*>(edit.add) + row * edit.add_stride : nullptr),
        gain(edit.slots.gain_of(token)),
        hidden(edit.hidden),
        num_scales(edit.num_scales) {}

  // h: the stream before the edit; y: after it; columns begin..begin + size.
  void edit_block(float* h, float* y, int64_t begin, int64_t size) const {
    load(h, x + begin, size);
    if (residual) shift(h, residual + begin, size);
    std::memcpy(y, h, size * sizeof(float));
    if (mul && num_scales == hidden) scale(y, mul + begin, size);
    if (mul && num_scales != hidden) scale_groups(y, mul, hidden / num_scales, begin, size);
    if (add) shift(y, add + begin, size);
    if (gain != 1.0f) blend(y, h, gain, size);
  }

  template <class Use>
  void for_blocks(const Use& use) const {
    alignas(64) float h[BLOCK], y[BLOCK];
    for (int64_t begin = 0; begin < hidden; begin += BLOCK) {
      const int64_t size = std::min(BLOCK, hidden - begin);
      edit_block(h, y, begin, size);
      use(h, y, begin, size);
    }
  }

  // The factor that gives the edited row the length it had before.
  float length_ratio() const {
    double before = 0, after = 0;
    for_blocks([&](const float* h, const float* y, int64_t, int64_t size) {
      before += sum_of_squares(h, size);
      after += sum_of_squares(y, size);
    });
    return after > 0 ? static_cast<float>(std::sqrt(before / after)) : 1.0f;
  }

  void run(bool renorm) const {
    const float ratio = renorm ? length_ratio() : 1.0f;
    for_blocks([&](const float*, float* y, int64_t begin, int64_t size) {
      if (ratio != 1.0f)
        for (int64_t i = 0; i < size; ++i) y[i] *= ratio;
      store(x + begin, y, size);
      if (residual) std::memset(residual + begin, 0, size * sizeof(X));
    });
  }
};

template <class X, class Table>
void run(const DiagEdit& edit) {
  for_rows(edit.slots.num_tokens, edit.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = edit.slots.row(token);
      if (row >= 0) Row<X, Table>(edit, token, row).run(edit.renorm);
    }
  });
}

void diag_edit_cpu(const Tensor& x, const MaybeTensor& mul, const MaybeTensor& add, const Tensor& slot,
                   const MaybeTensor& gain, const MaybeTensor& residual, bool renorm) {
  const DiagEdit edit = diag_edit(x, mul, add, slot, gain, residual, renorm);
  if (!any_edited(edit.slots)) return;
  with_float_type(x.scalar_type(), [&]<class X>(X) {
    if ((mul ? *mul : *add).scalar_type() == ScalarType::Float) return run<X, float>(edit);
    run<X, X>(edit);
  });
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("diag_edit_", TORCH_BOX(&whipstaff::diag_edit_cpu));
}
