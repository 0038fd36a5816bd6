// The door of `cut_rows_`.
#pragma once

#include "cut.cuh"
#include "logits.h"

namespace whipstaff {

inline const float* bound_of(const MaybeTensor& bound, const char* name, const Tensor& logits) {
  if (!bound) return nullptr;
  check_type(*bound, name, ScalarType::Float);
  check_per_token(*bound, name, logits.size(0));
  check_same_device(*bound, name, "logits", logits);
  return static_cast<const float*>(bound->data_ptr());
}

inline Cut cut(const Tensor& logits, const MaybeTensor& low, const MaybeTensor& high) {
  check_rows(logits, "logits");
  return {.logits = stream_of(logits, "logits", logits, "logits"),
          .vocab = logits.size(1),
          .low = bound_of(low, "low", logits),
          .high = bound_of(high, "high", logits)};
}

}  // namespace whipstaff
