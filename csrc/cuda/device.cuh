// What the kernels need of a device, in one place: threads, barriers, shared and global memory. Under g++ the header
// emulation.h (tests/emulation) gives the same names, counts bytes and refuses what a GPU would refuse.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/dtypes.h"
#include "../core/host_device.h"
#include "layout.h"

#ifndef __CUDACC__
#include "emulation.h"
#else

#define FASTWRS_KERNEL __global__
#define FASTWRS_DEVICE __device__ __forceinline__
// The parameter stays in constant memory, where it can be indexed.
#define FASTWRS_PARAMETER(Type) const __grid_constant__ Type

namespace fastwrs::cuda {

FASTWRS_DEVICE uint32_t thread_index() { return threadIdx.x; }
FASTWRS_DEVICE uint32_t thread_count() { return blockDim.x; }
FASTWRS_DEVICE uint32_t block_index() { return blockIdx.x; }
FASTWRS_DEVICE uint32_t block_count() { return gridDim.x; }

// All shared memory is dynamic.
FASTWRS_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

FASTWRS_DEVICE void barrier() { __syncthreads(); }
// A barrier that tells whether any thread of the block came with `flag` set.
FASTWRS_DEVICE bool barrier_any(bool flag) { return __syncthreads_or(flag); }
template <class T>
FASTWRS_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

// Adds 1 after everything that this thread has read and written before, returns what was there.
FASTWRS_DEVICE uint32_t take_ticket(uint32_t* counter) {
  __threadfence();
  return atomicAdd(counter, 1u);
}
// A number that another block has written before it took its ticket: not from a cache of this multiprocessor.
template <class T>
FASTWRS_DEVICE T load_others(const T* address) {
  return __ldcg(address);
}

template <class T>
FASTWRS_DEVICE T load(const T* address) {
  return *address;
}
// A number that all threads of a block read: one cache line serves them.
template <class T>
FASTWRS_DEVICE T load_shared_by_all(const T* address) {
  return *address;
}
template <class T>
FASTWRS_DEVICE void store(T* address, T value) {
  *address = value;
}

// Sixteen bytes. Memory is used once, so it need not stay in the caches; what a second phase reads again is stored with
// keep.
struct alignas(16) Word {
  uint4 bits;
};
FASTWRS_DEVICE Word load_word(const void* address) { return {__ldcs(static_cast<const uint4*>(address))}; }
FASTWRS_DEVICE void store_word(void* address, Word word, bool keep) {
  if (keep) {
    *static_cast<uint4*>(address) = word.bits;
  } else {
    __stcs(static_cast<uint4*>(address), word.bits);
  }
}

}  // namespace fastwrs::cuda

#endif

namespace fastwrs::cuda {

// N elements, a multiple of 16 bytes at a multiple of 16 bytes.
template <int N, class T>
FASTWRS_DEVICE void load_vector(const T* address, T (&x)[N]) {
  static_assert(N * sizeof(T) % kWordBytes == 0, "whole words");
  Word words[N * sizeof(T) / kWordBytes];
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / kWordBytes); ++i) {
    words[i] = load_word(reinterpret_cast<const char*>(address) + i * kWordBytes);
  }
  memcpy(x, words, sizeof x);
}
template <int N, class T>
FASTWRS_DEVICE void store_vector(T* address, const T (&x)[N], bool keep) {
  Word words[N * sizeof(T) / kWordBytes];
  memcpy(words, x, sizeof x);
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / kWordBytes); ++i) {
    store_word(reinterpret_cast<char*>(address) + i * kWordBytes, words[i], keep);
  }
}

}  // namespace fastwrs::cuda
