// Marks a function of core that kernels call too.
#pragma once

#if defined(__CUDACC__)
#define COTNET_HD __host__ __device__
#else
#define COTNET_HD
#endif
