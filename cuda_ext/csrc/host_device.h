// Marks the functions that both the CPU and the CUDA kernels call.
#pragma once

#ifdef __CUDACC__
#define WHIPSTAFF_HOST_DEVICE __host__ __device__
#else
#define WHIPSTAFF_HOST_DEVICE
#endif
