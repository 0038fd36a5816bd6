// What the CPU kernels share: loops over rows that use every thread only when there is enough to do, and blocks of
// float32 that fit in the first-level cache.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "isa.h"

namespace whipstaff {

constexpr int64_t BLOCK = 512;             // floats in one block: 2 KiB
constexpr int64_t MIN_PER_THREAD = 32768;  // elements below which a second thread costs more than it saves

// body(begin, end) over disjoint ranges of rows, each compiled for the widest vectors.
template <class Body>
void for_rows(int64_t num_rows, int64_t row_size, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, MIN_PER_THREAD / std::max<int64_t>(1, row_size));
  if (num_rows <= grain) return with_widest_vectors([&] { body(0, num_rows); });
  torch::stable::parallel_for(0, num_rows, grain,
                              [&](int64_t begin, int64_t end) { with_widest_vectors([&] { body(begin, end); }); });
}

// body(type{}) for the C++ type behind a torch dtype; the door has refused all others.
template <class Body>
void with_float_type(ScalarType type, const Body& body) {
  if (type == ScalarType::BFloat16) return body(c10::BFloat16{});
  if (type == ScalarType::Half) return body(c10::Half{});
  body(float{});
}

template <class T>
void load(float* __restrict block, const T* __restrict source, int64_t size) {
  for (int64_t i = 0; i < size; ++i) block[i] = static_cast<float>(source[i]);
}

template <class T>
void store(T* __restrict target, const float* __restrict block, int64_t size) {
  for (int64_t i = 0; i < size; ++i) target[i] = static_cast<T>(block[i]);
}

template <class Table>
void add_scaled(float* __restrict sum, float scale, const Table* __restrict direction, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += scale * static_cast<float>(direction[i]);
}

}  // namespace whipstaff
