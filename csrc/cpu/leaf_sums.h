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
template <class C>
struct Sixteen {
  typedef C type __attribute__((vector_size(16 * sizeof(C)), aligned(alignof(C)), may_alias));
};

// The open block becomes part of the cascade: equal numbers of blocks are added to each other, as in binary counting.
template <class Lane, class C>
inline void close_block(Accumulator<C>& a) {
  const int64_t width = a.width * int64_t(sizeof(C)) / int64_t(sizeof(Lane));
  Lane* __restrict block = reinterpret_cast<Lane*>(a.levels);
  Lane* __restrict level = block + width;
  for (int64_t bits = a.blocks; bits & 1; bits >>= 1, level += width) {
    for (int64_t j = 0; j < width; ++j) block[j] += level[j];
  }
  for (int64_t j = 0; j < width; ++j) {
    level[j] = block[j];
    block[j] = Lane{};
  }
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
// 64 lanes down to one without loops.
template <class C>
inline C add_row(const C* open, const C* levels, int64_t blocks) {
  using Wide = typename Sixteen<C>::type;
  static_assert(Accumulator<C>::kLanes == 64, "four times sixteen");
  const Wide *lanes = reinterpret_cast<const Wide*>(open), *level = reinterpret_cast<const Wide*>(levels);
  Wide sum[4] = {lanes[0], lanes[1], lanes[2], lanes[3]};
  for (int64_t bits = blocks; bits != 0; bits >>= 1, level += 4) {
    if (!(bits & 1)) continue;
    for (int k = 0; k < 4; ++k) sum[k] += level[k];
  }
  const Wide sixteen = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  C t[16];
  std::memcpy(t, &sixteen, sizeof t);
  for (int j = 0; j < 8; ++j) t[j] += t[j + 8];
  for (int j = 0; j < 4; ++j) t[j] += t[j + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
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

// Sums over the one row that a loop is at, kSets of them side by side: what an Accumulator of one column makes of them,
// without a way through its memory for each block.
template <class C, int kSets>
class RowSums {
  static constexpr int64_t kLanes = Accumulator<C>::kLanes;

 public:
  explicit RowSums(void* const* levels) {
    for (int k = 0; k < kSets; ++k) levels_[k] = static_cast<C*>(levels[k]);
  }
  // `lanes`: [kSets, kLanes], of a whole block.
  void close_block(const C* lanes) {
    using Wide = typename Sixteen<C>::type;
    for (int k = 0; k < kSets; ++k) {
      const Wide* block = reinterpret_cast<const Wide*>(lanes + k * kLanes);
      Wide sum[4] = {block[0], block[1], block[2], block[3]};
      Wide* level = reinterpret_cast<Wide*>(levels_[k]);
      for (int64_t bits = blocks_; bits & 1; bits >>= 1, level += 4) {
        for (int j = 0; j < 4; ++j) sum[j] += level[j];
      }
      for (int j = 0; j < 4; ++j) level[j] = sum[j];
    }
    ++blocks_;
  }
  // `lanes`: of the block that is open.
  void finish(const C* lanes, C* sums) const {
    for (int k = 0; k < kSets; ++k) sums[k] = add_row(lanes + k * kLanes, levels_[k], blocks_);
  }

 private:
  C* levels_[kSets];
  int64_t blocks_ = 0;
};

// Memory so many elements ahead is asked for while a row is summed: what comes next in that row or is the next row. The
// processor does not look that far by itself while it has this much to compute.
constexpr int64_t kAhead = Accumulator<float>::kTurns * kLanes;
// Inlined by force, as whatever calls it: a function that does nothing else is one without an effect to the compiler,
// which drops the call.
#define FASTWRS_FETCHES __attribute__((always_inline))
template <class T>
FASTWRS_FETCHES inline void fetch(const T* x) {
  for (int64_t j = 0; j < kLanes; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + j);
}

// Calls at(i, terms) for n elements, one block at most, which gives a term of each of kSets sums: that of element i
// goes to lane i % 64. `lanes`: [kSets, kLanes]; they begin here. ask(i) asks for the memory of the 64 elements from i
// on.
template <int kSets, class C, class Ask, class At>
inline void sum_block(int64_t n, C* __restrict lanes, const Ask& ask, const At& at) {
  using Wide = typename Sixteen<C>::type;
  constexpr int64_t kParts = kLanes / 16;
  const auto add = [&](int64_t i, int64_t lane) {
    C terms[kSets];
    at(i, terms);
    for (int k = 0; k < kSets; ++k) lanes[k * kLanes + lane] += terms[k];
  };
  const int64_t turns = n / kLanes, whole = turns * kLanes;
  if constexpr (kSets == 1) {
    for (int64_t j = 0; j < kParts; ++j) reinterpret_cast<Wide*>(lanes)[j] = Wide{};
    for (int64_t begin = 0; begin < whole; begin += kLanes) {
      ask(begin + kAhead);
#pragma GCC ivdep
      for (int64_t j = 0; j < kLanes; ++j) add(begin + j, j);
    }
  } else {
    Wide sums[kSets][kParts] = {};
    // More lanes than one sum has stay in registers through all turns, as far as there are enough of these.
    for (int64_t begin = 0; begin < whole; begin += kLanes) {
      ask(begin + kAhead);
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part) {
        Wide terms[kSets];
#pragma GCC ivdep
        for (int64_t j = 0; j < 16; ++j) {
          C of_one[kSets];
          at(begin + part * 16 + j, of_one);
          for (int k = 0; k < kSets; ++k) reinterpret_cast<C*>(terms + k)[j] = of_one[k];
        }
        for (int k = 0; k < kSets; ++k) sums[k][part] += terms[k];
      }
    }
    std::memcpy(lanes, sums, sizeof sums);
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < n - whole; ++j) add(whole + j, j);
}

// The sums over a row of n elements: run(begin, n, lanes) makes those of a block, or of what is left, by sum_block.
template <class C, int kSets, class Run>
inline void sum_row(int64_t n, void* const* levels, C* sums, const Run& run) {
  constexpr int64_t kBlock = Accumulator<C>::kTurns * kLanes;
  RowSums<C, kSets> row(levels);
  alignas(64) C lanes[kSets * kLanes];
  for (int64_t done = 0;; done += kBlock) {
    const int64_t left = n - done;
    run(done, left < kBlock ? left : kBlock, lanes);
    if (left < kBlock) break;
    row.close_block(lanes);
  }
  row.finish(lanes, sums);
}

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
