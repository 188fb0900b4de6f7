// Sums as cascades. A part of leaves.cpp, which is compiled once per instruction set.
#pragma once

#include <cstring>

#include "leaves.h"

// Of functions whose loops are to be vectorised: all that they call becomes a part of them, which the compiler would
// stop doing in a file as large as this. Where speed is not asked for, that is only slow to compile.
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__)
#define FASTWRS_FLATTENED __attribute__((flatten))
#else
#define FASTWRS_FLATTENED
#endif

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

constexpr int64_t kLanes = Accumulator<float>::kLanes;  // of any compute type

template <class C>
void start(Accumulator<C>& a) {
  a.position = a.turns = a.blocks = 0;
  for (int64_t j = 0; j < a.width; ++j) a.levels[j] = 0;
}

// Lanes are added 16 at a time where their number allows it, which the compiler would not see by itself.
template <class C, int kCount>
struct VectorOf {
  typedef C type __attribute__((vector_size(kCount * sizeof(C)), aligned(alignof(C)), may_alias));
};
template <class C>
using Sixteen = VectorOf<C, 16>;

// A block becomes part of the cascade behind so many others: equal numbers of them are added to each other, as in
// binary counting.
template <class Lane>
inline void carry(Lane* __restrict block, Lane* __restrict level, int64_t width, int64_t blocks) {
  for (int64_t bits = blocks; bits & 1; bits >>= 1, level += width) {
    for (int64_t j = 0; j < width; ++j) block[j] += level[j];
  }
  for (int64_t j = 0; j < width; ++j) level[j] = block[j];
}

template <class Lane, class C>
inline void close_block(Accumulator<C>& a) {
  const int64_t width = a.width * int64_t(sizeof(C)) / int64_t(sizeof(Lane));
  Lane* block = reinterpret_cast<Lane*>(a.levels);
  carry(block, block + width, width, a.blocks);
  for (int64_t j = 0; j < width; ++j) block[j] = Lane{};
  ++a.blocks;
  a.turns = 0;
}

enum class Term { kValue, kSquare, kProduct };
template <Term kTerm, class T>
inline T term(T x, T y) {
  return kTerm == Term::kValue ? x : kTerm == Term::kSquare ? x * x : x * y;
}

// Whole blocks. Returns how many elements that were.
template <class Lane, Term kTerm, class C>
inline int64_t add_blocks(Accumulator<C>& a, const C* x, const C* y, int64_t n) {
  const int64_t width = a.width * int64_t(sizeof(C)) / int64_t(sizeof(Lane)),
                block_size = Accumulator<C>::kTurns * a.width;
  const int64_t blocks = n / block_size;
  for (int64_t block = 0; block < blocks; ++block) {
    const Lane* __restrict turns = reinterpret_cast<const Lane*>(x + block * block_size);
    const Lane* __restrict others = reinterpret_cast<const Lane*>(y + block * block_size);
    Lane* __restrict lanes = reinterpret_cast<Lane*>(a.levels);
    for (int64_t j = 0; j < width; ++j) {
      Lane sum{};
      for (int64_t turn = 0; turn < Accumulator<C>::kTurns; ++turn) {
        sum += term<kTerm>(turns[turn * width + j], others[turn * width + j]);
      }
      lanes[j] = sum;
    }
    close_block<Lane>(a);
  }
  return blocks * block_size;
}

template <class C, Term kTerm>
void add_terms(Accumulator<C>& a, const C* __restrict x, const C* __restrict y, int64_t n) {
  const bool sixteen = a.width % 16 == 0;
  if (a.position == 0 && a.turns == 0) {
    const int64_t done =
        sixteen ? add_blocks<typename Sixteen<C>::type, kTerm>(a, x, y, n) : add_blocks<C, kTerm>(a, x, y, n);
    x += done;
    y += done;
    n -= done;
  }
  while (n > 0) {
    const int64_t rest = a.width - a.position, m = n < rest ? n : rest;
    C* __restrict lanes = a.levels + a.position;
    for (int64_t j = 0; j < m; ++j) lanes[j] += term<kTerm>(x[j], y[j]);
    x += m;
    y += m;
    n -= m;
    a.position += m;
    if (a.position == a.width) {
      a.position = 0;
      if (++a.turns == Accumulator<C>::kTurns) sixteen ? close_block<typename Sixteen<C>::type>(a) : close_block<C>(a);
    }
  }
}

template <class C, bool kSquare>
void add(Accumulator<C>& a, const C* x, int64_t n) {
  add_terms<C, kSquare ? Term::kSquare : Term::kValue>(a, x, x, n);
}

template <class Lane, class C>
inline void add_levels(Accumulator<C>& a) {
  const int64_t width = a.width * int64_t(sizeof(C)) / int64_t(sizeof(Lane));
  Lane* __restrict total = reinterpret_cast<Lane*>(a.levels);
  const Lane* __restrict level = total + width;
  for (int64_t bits = a.blocks; bits != 0; bits >>= 1, level += width) {
    if (!(bits & 1)) continue;
    for (int64_t j = 0; j < width; ++j) total[j] += level[j];
  }
}

// The number of lanes of a column is a power of two: they are halved until one is left, or Lane is too wide for it.
template <class Lane, class C>
inline int64_t halve_lanes(C* sums, int64_t count, int64_t cols) {
  constexpr int64_t kPerLane = sizeof(Lane) / sizeof(C);
  Lane* total = reinterpret_cast<Lane*>(sums);
  while (count > cols && count % (2 * kPerLane) == 0) {
    count /= 2;
    for (int64_t j = 0; j < count / kPerLane; ++j) total[j] += total[j + count / kPerLane];
  }
  return count;
}

// The usual case by itself, since it is paid for every row: the open block of one column, and so many closed ones, from
// kLanes down to one without loops.
template <class C>
inline C add_row(const C* open, const C* levels, int64_t blocks) {
  using Wide = typename Sixteen<C>::type;
  static_assert(Accumulator<C>::kLanes == 32, "twice sixteen");
  const Wide *lanes = reinterpret_cast<const Wide*>(open), *level = reinterpret_cast<const Wide*>(levels);
  Wide sum[2] = {lanes[0], lanes[1]};
  for (int64_t bits = blocks; bits != 0; bits >>= 1, level += 2) {
    if (!(bits & 1)) continue;
    for (int k = 0; k < 2; ++k) sum[k] += level[k];
  }
  const Wide sixteen = sum[0] + sum[1];
  typename VectorOf<C, 8>::type halves[2];
  std::memcpy(halves, &sixteen, sizeof halves);
  const auto eight = halves[0] + halves[1];
  typename VectorOf<C, 4>::type quarters[2];
  std::memcpy(quarters, &eight, sizeof quarters);
  const auto four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Writes the sums and leaves the accumulator as `start` does.
template <class C>
void finish(Accumulator<C>& a, C* sums) {
  using Wide = typename Sixteen<C>::type;
  if (a.cols == 1) {
    sums[0] = add_row(a.levels, a.levels + a.width, a.blocks);
    std::memset(a.levels, 0, Accumulator<C>::kLanes * sizeof(C));
  } else {
    if (a.width % 16 == 0) {
      add_levels<Wide>(a);
    } else {
      add_levels<C>(a);
    }
    const int64_t count = halve_lanes<Wide>(a.levels, a.width, a.cols);
    halve_lanes<C>(a.levels, count, a.cols);
    for (int64_t j = 0; j < a.cols; ++j) sums[j] = a.levels[j];
    for (int64_t j = 0; j < a.width; ++j) a.levels[j] = 0;
  }
  a.position = a.turns = a.blocks = 0;
}

// Memory so many elements ahead is asked for while a row is summed: what comes next in that row or is the next row. The
// processor does not look that far by itself while it has this much to compute.
constexpr int64_t kAhead = 512;
// Inlined by force, as whatever calls it: a function that does nothing else is one without an effect to the compiler,
// which drops the call.
#define FASTWRS_FETCHES __attribute__((always_inline))
template <class T>
FASTWRS_FETCHES inline void fetch(const T* x) {
  for (int64_t j = 0; j < kLanes; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + j);
}

// kSets sums over a row of n elements: what an Accumulator of one column makes of them, with the open block at hand.
// at(i, terms) gives the terms of element i, one of each sum; ask(i) asks for the memory of kLanes elements from i on.
template <int kSets, class C, class Ask, class At>
inline void sum_row(int64_t n, void* const* levels, C* sums, const Ask& ask, const At& at) {
  using Wide = typename Sixteen<C>::type;
  constexpr int64_t kParts = kLanes / 16, kBlock = Accumulator<C>::kTurns * kLanes;
  const int64_t whole = n / kLanes * kLanes;
  alignas(64) C lanes[kSets][kLanes];
  // Of the form that is vectorised for all types: lanes that are held in registers by hand are not, for some.
  const auto add = [&](int64_t first, int64_t count) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      C terms[kSets];
      at(first + j, terms);
      for (int k = 0; k < kSets; ++k) lanes[k][j] += terms[k];
    }
  };
  int64_t blocks = 0;
  for (;; ++blocks) {
    const int64_t begin = blocks * kBlock, end = begin + kBlock < whole ? begin + kBlock : whole;
    for (int k = 0; k < kSets; ++k) {
      for (int64_t part = 0; part < kParts; ++part) reinterpret_cast<Wide*>(lanes[k])[part] = Wide{};
    }
    for (int64_t first = begin; first < end; first += kLanes) {
      ask(first + kAhead);
      add(first, kLanes);
    }
    if (end - begin < kBlock) break;
    for (int k = 0; k < kSets; ++k) {
      carry(reinterpret_cast<Wide*>(lanes[k]), static_cast<Wide*>(levels[k]), kParts, blocks);
    }
  }
  add(whole, n - whole);
  for (int k = 0; k < kSets; ++k) sums[k] = add_row(lanes[k], static_cast<const C*>(levels[k]), blocks);
}

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
