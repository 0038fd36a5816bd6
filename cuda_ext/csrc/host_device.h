// Marks the functions that both the CPU and the CUDA kernels call: everywhere, or only where the kernels run.
#pragma once

#ifdef __CUDACC__
#define WHIPSTAFF_HOST_DEVICE __host__ __device__
#define WHIPSTAFF_DEVICE __device__
#else
#define WHIPSTAFF_HOST_DEVICE
#define WHIPSTAFF_DEVICE
#endif
