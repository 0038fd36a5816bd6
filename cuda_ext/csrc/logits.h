// The door for rows of logits: a checked tensor becomes a LogitStream.
#pragma once

#include <string>

#include "checks.h"
#include "logits.cuh"

namespace whipstaff {

inline FloatType float_type(const Tensor& tensor, const char* name) {
  check_float(tensor, name);
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::BFloat16 ? FloatType::BFloat16
         : type == ScalarType::Half   ? FloatType::Float16
                                      : FloatType::Float32;
}

// A stream may be padded beyond the vocabulary of `out`, the tensor called `out_name`.
inline LogitStream stream_of(const Tensor& stream, const std::string& name, const Tensor& out, const char* out_name) {
  check_rows(stream, name.c_str());
  check_same_device(stream, name.c_str(), out_name, out);
  STD_TORCH_CHECK(stream.size(1) >= out.size(1), name, " has ", stream.size(1), " columns, fewer than ", out_name,
                  "'s vocabulary of ", out.size(1));
  return {.data = stream.data_ptr(),
          .num_rows = stream.size(0),
          .stride = stream.stride(0),
          .type = float_type(stream, name.c_str())};
}

}  // namespace whipstaff
