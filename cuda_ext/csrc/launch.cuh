// What the CUDA operators share on the host side: current stream, type dispatch, and whether rows allow wide loads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "checks.h"
#include "cuda.cuh"

namespace whipstaff {

// The stream torch is using on the tensor's device: the one a CUDA graph captures.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// body(type{}) for the CUDA type behind a torch dtype; the door has refused all others.
template <class Body>
void with_float_type(ScalarType type, const Body& body) {
  if (type == ScalarType::BFloat16) return body(__nv_bfloat16{});
  if (type == ScalarType::Half) return body(__half{});
  body(float{});
}

// Every row begins on a 16-byte boundary, or the tensor is absent.
inline bool has_aligned_rows(const void* data, int64_t stride, size_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size % 16 == 0;
}

// What `bytes` of device memory hold once the stream has come this far. It waits, so only checked mode may call it.
inline std::vector<char> host_copy(const void* data, size_t bytes, cudaStream_t stream) {
  std::vector<char> copy(bytes);
  STD_CUDA_CHECK(cudaMemcpyAsync(copy.data(), data, bytes, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return copy;
}

inline size_t index_size(bool is_int64) { return is_int64 ? sizeof(int64_t) : sizeof(int32_t); }

}  // namespace whipstaff
