// What csrc/cuda/device.cuh gives the kernels on a GPU, for g++: a block's threads are fibers that run one at a time
// and change places at barriers and shuffles. Fails on what a GPU would refuse or get wrong: vectors at odd addresses,
// memory that belongs to no operand, threads of a block at different barriers. Counts the bytes of global memory.
//
// Under ThreadSanitizer every fiber is a thread of its own, and only barriers order their memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define FASTWRS_KERNEL
#define FASTWRS_DEVICE inline
#define FASTWRS_PARAMETER(Type) const Type&
#define __launch_bounds__(...)

#if defined(__SANITIZE_THREAD__)
#define FASTWRS_MACHINERY __attribute__((no_sanitize_thread, noinline))
#else
#define FASTWRS_MACHINERY __attribute__((noinline))
#endif

namespace fastwrs::emulation {

// Where this thread is.
uint32_t thread_index();
uint32_t thread_count();
uint32_t block_index();
uint32_t block_count();
char* shared_memory();

// `where` tells the barriers of a kernel apart.
void barrier(int where);
bool barrier_any(bool flag, int where);
// The eight bytes that the thread of this warp with another index holds. Orders no memory.
uint64_t shuffle_xor(uint64_t x, int lanes);
uint32_t take_ticket(uint32_t* counter);

// Before every access to global memory.
void about_to_read(const void* address, size_t bytes, bool counted = true);
void about_to_write(const void* address, size_t bytes);

}  // namespace fastwrs::emulation

namespace fastwrs::cuda {

inline uint32_t thread_index() { return emulation::thread_index(); }
inline uint32_t thread_count() { return emulation::thread_count(); }
inline uint32_t block_index() { return emulation::block_index(); }
inline uint32_t block_count() { return emulation::block_count(); }
inline char* shared_memory() { return emulation::shared_memory(); }
inline void barrier(int where = __builtin_LINE()) { emulation::barrier(where); }
inline bool barrier_any(bool flag, int where = __builtin_LINE()) { return emulation::barrier_any(flag, where); }
inline uint32_t take_ticket(uint32_t* counter) { return emulation::take_ticket(counter); }

template <class T>
T shuffle_xor(T x, int lanes) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  bits = emulation::shuffle_xor(bits, lanes);
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
T load(const T* address) {
  emulation::about_to_read(address, sizeof(T));
  return *address;
}
template <class T>
T load_others(const T* address) {
  return load(address);
}
// Counted once for the block.
template <class T>
T load_shared_by_all(const T* address) {
  emulation::about_to_read(address, sizeof(T), emulation::thread_index() == 0);
  return *address;
}
template <class T>
void store(T* address, T value) {
  emulation::about_to_write(address, sizeof(T));
  *address = value;
}

struct alignas(16) Word {
  uint64_t bits[2];
};
inline Word load_word(const void* address) { return load(static_cast<const Word*>(address)); }
inline void store_word(void* address, Word word, bool /*keep*/) { store(static_cast<Word*>(address), word); }

}  // namespace fastwrs::cuda
