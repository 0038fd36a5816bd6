// diag_edit_ on the CPU: one pass over each edited row, in blocks that fit in the first-level cache.
#include "diag_edit.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.h"
#include "diag_block.h"

namespace whipstaff {
namespace {

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

  // The factors of columns begin..begin + size; one factor per group of columns is spread over `scratch`.
  const Table* factors(Table* scratch, int64_t begin, int64_t size) const {
    if (!mul) return Neutral<Table>::get().ones;
    if (num_scales == hidden) return mul + begin;
    const int64_t width = hidden / num_scales;
    for (int64_t i = 0; i < size;) {
      const int64_t group = (begin + i) / width, stop = std::min(size, (group + 1) * width - begin);
      std::fill(scratch + i, scratch + stop, mul[group]);
      i = stop;
    }
    return scratch;
  }

  template <class Use>
  void for_blocks(const Use& use) const {
    Table scratch[BLOCK];
    for (int64_t begin = 0; begin < hidden; begin += BLOCK) {
      const int64_t size = std::min(BLOCK, hidden - begin);
      use(Block<X, Table>{.x = x + begin,
                          .residual = residual ? residual + begin : nullptr,
                          .mul = factors(scratch, begin, size),
                          .add = add ? add + begin : Neutral<Table>::get().negative_zeros,
                          .gain = gain,
                          .begin = begin,
                          .size = size});
    }
  }

  // The factor that gives the edited row the length it had before.
  float length_ratio() const {
    float before[BLOCK], after[BLOCK];
    double before_squared = 0, after_squared = 0;
    for_blocks([&](const Block<X, Table>& block) {
      block.template for_columns<true>([&](int64_t i, float h, float y) { before[i] = h, after[i] = y; });
      before_squared += sum_of_squares(before, block.size);
      after_squared += sum_of_squares(after, block.size);
    });
    return after_squared > 0 ? static_cast<float>(std::sqrt(before_squared / after_squared)) : 1.0f;
  }

  void run(bool renorm) const {
    const float ratio = renorm ? length_ratio() : 1.0f;
    const bool is_plain = gain == 1.0f && ratio == 1.0f;
    for_blocks([&](const Block<X, Table>& block) {
      X* target = x + block.begin;
      const auto put = [=](int64_t i, float, float y) { target[i] = static_cast<X>(y); };
      const auto put_scaled = [=](int64_t i, float, float y) { target[i] = static_cast<X>(y * ratio); };
      is_plain ? block.template for_columns<false>(put) : block.template for_columns<true>(put_scaled);
      if (residual) std::memset(residual + block.begin, 0, block.size * sizeof(X));
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

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) { library.impl("diag_edit_", TORCH_BOX(&whipstaff::diag_edit_cpu)); }
