// Questions the operators ask about a tensor before they take its pointer; every refusal names the tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

namespace whipstaff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool is_index_type(ScalarType type) { return type == ScalarType::Int || type == ScalarType::Long; }

inline void check_float(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_float_type(tensor.scalar_type()), name, " must be float32, bfloat16 or float16, not ",
                  toString(tensor.scalar_type()));
}

inline void check_type(const Tensor& tensor, const char* name, ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " must be ", toString(wanted), ", not ",
                  toString(tensor.scalar_type()));
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline void check_same_device(const Tensor& tensor, const char* name, const char* x_name, const Tensor& x) {
  const bool is_same = tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index();
  STD_TORCH_CHECK(is_same, name, " is on ", device_of(tensor), ", ", x_name, " on ", device_of(x));
}

// (rows, columns) with neighbouring columns next to each other in memory; rows may be any distance apart.
inline void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, not shape ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name,
                  " must be contiguous in its last dimension, not stride ", tensor.stride(1));
}

// A persistent per-token buffer: at least `needed` long, its first entries are used.
inline void check_per_token(const Tensor& tensor, const char* name, int64_t needed) {
  STD_TORCH_CHECK(tensor.dim() == 1, name, " must have 1 dimension, not shape ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.size(0) >= needed, name, " has ", tensor.size(0), " entries for ", needed, " rows");
  STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) == 1, name, " must be contiguous, not stride ",
                  tensor.stride(0));
}

// The second half of a stream that the engine carries as a sum.
inline void check_residual(const Tensor& residual, const Tensor& x) {
  check_rows(residual, "residual");
  check_type(residual, "residual", x.scalar_type());
  check_same_device(residual, "residual", "x", x);
  STD_TORCH_CHECK(residual.size(0) == x.size(0) && residual.size(1) == x.size(1), "residual has shape ",
                  shape_of(residual), ", x has ", shape_of(x));
}

// Checked mode looks at every index and refuses those that name nothing; otherwise such tokens are left alone.
inline bool is_checked_mode() {
  static const bool on = [] {
    const char* value = std::getenv("WHIPSTAFF_CUDA_EXT_CHECKED");
    return value != nullptr && std::string(value) == "1";
  }();
  return on;
}

}  // namespace whipstaff
