// One macro for functions that run on the host and on a GPU, and the inline namespace that keeps copies of the same
// header-only code apart when it is compiled for several instruction sets into one library (the linker would merge
// them).
#pragma once

#ifdef __CUDACC__
#define FASTWRS_HD __host__ __device__ __forceinline__
#else
#define FASTWRS_HD inline
#endif

#ifndef FASTWRS_ISA
#define FASTWRS_ISA common
#endif
#define FASTWRS_BEGIN \
  namespace fastwrs { \
  inline namespace FASTWRS_ISA {
#define FASTWRS_END \
  }                 \
  }
