// Marks the functions that both the CPU and the CUDA kernels call: everywhere, or only where the kernels run. With
// WHIPSTAFF_KERNELS the CUDA kernels themselves are compiled: by nvcc, or by g++ for cuda_on_cpu.h.
#pragma once

#if defined(__CUDACC__)
#define WHIPSTAFF_KERNELS
#define WHIPSTAFF_HOST_DEVICE __host__ __device__
#define WHIPSTAFF_DEVICE __device__
#else
#ifdef WHIPSTAFF_CUDA_ON_CPU
#define WHIPSTAFF_KERNELS
#endif
#define WHIPSTAFF_HOST_DEVICE
#define WHIPSTAFF_DEVICE
#endif
