// What the CUDA operators share on the host side: the device, type dispatch, and whether rows allow wide loads.
#pragma once

#ifndef WHIPSTAFF_CUDA_ON_CPU
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

#include <type_traits>
#include <vector>

#include "checks.h"
#include "cuda.cuh"

namespace whipstaff {

struct Grid {
  dim3 blocks;  // of THREADS threads each
  size_t shared_bytes = 0;  // of dynamic_shared() for each block
};

#ifndef WHIPSTAFF_CUDA_ON_CPU

// Where a tensor is. As long as this lives, its device is the current one; work goes to the stream that torch is using
// there: the one a CUDA graph captures.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), Grid grid, const std::type_identity_t<Parameters>&... arguments) const {
    kernel<<<grid.blocks, THREADS, grid.shared_bytes, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The most shared memory, in bytes, that a block may have where it asks for it.
  size_t max_shared() const {
    int device = 0, most = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return most;
  }

  template <class... Parameters>
  void ask_for_shared(void (*kernel)(Parameters...), size_t bytes) const {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }

  // What `bytes` of device memory hold once the stream has come this far. It waits, so only checked mode may call it.
  std::vector<char> host_copy(const void* data, size_t bytes) const {
    std::vector<char> copy(bytes);
    STD_CUDA_CHECK(cudaMemcpyAsync(copy.data(), data, bytes, cudaMemcpyDeviceToHost, stream));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));
    return copy;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

#else

class Device {
 public:
  explicit Device(const Tensor&) {}

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), Grid grid, const std::type_identity_t<Parameters>&... arguments) const {
    cuda_on_cpu::check_shared(reinterpret_cast<void*>(kernel), grid.shared_bytes);
    cuda_on_cpu::launch(grid.blocks, THREADS, grid.shared_bytes, [=] { kernel(arguments...); });
  }

  size_t max_shared() const { return cuda_on_cpu::MAX_SHARED; }

  template <class... Parameters>
  void ask_for_shared(void (*kernel)(Parameters...), size_t bytes) const {
    cuda_on_cpu::asked_shared()[reinterpret_cast<void*>(kernel)] = bytes;
  }

  std::vector<char> host_copy(const void* data, size_t bytes) const {
    const char* begin = static_cast<const char*>(data);
    return {begin, begin + bytes};
  }
};

#endif  // WHIPSTAFF_CUDA_ON_CPU

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

inline size_t index_size(bool is_int64) { return is_int64 ? sizeof(int64_t) : sizeof(int32_t); }

}  // namespace whipstaff
