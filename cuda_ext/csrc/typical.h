// The door of `typical_rows_`.
#pragma once

#include "logits.h"
#include "typical.cuh"

namespace whipstaff {

inline Typical typical(const Tensor& logits, const Tensor& mass) {
  check_rows(logits, "logits");
  check_type(mass, "mass", ScalarType::Float);
  check_per_token(mass, "mass", logits.size(0));
  check_same_device(mass, "mass", "logits", logits);
  return {.logits = stream_of(logits, "logits", logits, "logits"),
          .vocab = logits.size(1),
          .mass = static_cast<const float*>(mass.data_ptr())};
}

}  // namespace whipstaff
