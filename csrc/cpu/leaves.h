// The innermost loops. They are compiled once per instruction set and reached through one table of function pointers;
// everything above them (engine.cpp) is compiled once. Each gives the same bits for every instruction set: updates are
// element-wise, sums have a fixed number of lanes, and -ffp-contract=off keeps fused multiply-adds out.
#pragma once

#include <cstdint>

#include "../core/table.h"
#include "../norms/looks.h"
#include "../norms/measured.h"

namespace fastwrs::cpu {

// A run of elements of one tensor.
struct UpdateArgs {
  void* param;  // read; written by the caller from `updated` unless that is the same memory
  void* grad;   // written only when grad_scale is not 0
  void* state[kMaxSlots];
  void* updated;  // compute type
  void* step;     // compute type, or null: u is not wanted
  // Where the run is a whole row, what is summed over it, in the compute type, or null: the squares of the updated
  // weights, or with `measures` all of norms/measured.h. Not where the gradient is unscaled or u is wanted.
  void* sums;
  bool measures;
  void* levels[kSums];  // scratch for each sum
  void* behind;         // other n elements of the compute type, to be multiplied by behind_factor on the way, or null
  double behind_factor;
  const void* scalars;  // Rule::Scalars in the compute type
  double grad_scale;    // 0: none
  bool maximize;
  // Of rules that look first: whether there is something to be told (a number, for with a bool loops do not vectorise),
  // and the numbers, the same for all elements or (compute type) of each.
  double tells;
  double told[kMostEach];
  const void* told_each[kMostEach];  // all or none
  int64_t n;
};

// A run in the first pass of a rule that looks at whole tensors.
struct LookArgs {
  void* param;  // read
  // Where the run is a whole row: its sums, in the compute type, and scratch for each; not where the gradient is
  // unscaled. Null: the values that they are made of are left in scratch.
  void* sums;
  void* levels[kMostSums];
  int64_t n;
  // Where it changes the states (kGate).
  void* grad;  // written only when grad_scale is not 0 and `unscales`
  void* state[kMaxSlots];
  void *weights, *slope,
      *step;  // compute type: widened weights, the gradient that the rule sees, the step to be judged
  const void* scalars;
  double grad_scale;
  bool maximize, unscales;
  // Where it reads the weights alone (kShift): the channel's origin, of the row, or (compute type) of each element.
  void* distances;  // compute type
  double origin;
  const void* origin_each;
};

// Sums of squares of a group's elements, one per column, as a cascade: 8 turns of `width` lanes make a block, blocks
// are added pairwise. Element i of the group goes to lane i % width and to column i % cols.
template <class C>
struct Accumulator {
  int64_t width = 0, cols = 0;
  C* levels = nullptr;  // [level][width]; level 0 is the open block, level k > 0 holds 2^(k - 1) blocks
  int64_t position = 0, turns = 0, blocks = 0;

  static constexpr int64_t kTurns = 8, kLanes = 32;
  // Columns get several lanes each while they are few, so that whole vectors are added.
  static constexpr int64_t width_for(int64_t cols) { return cols == 1 ? kLanes : cols <= 64 ? 16 * cols : cols; }
  static constexpr int64_t levels_for(int64_t cols, int64_t elements) {
    int64_t levels = 2;
    for (int64_t blocks = elements / (width_for(cols) * kTurns); blocks > 0; blocks /= 2) ++levels;
    return levels;
  }
  // Elements of `levels` that an accumulator over groups of so many elements needs.
  static constexpr int64_t storage_for(int64_t cols, int64_t elements) {
    return levels_for(cols, elements) * width_for(cols);
  }
};

template <class C>
struct SumLeaves {
  void (*start)(Accumulator<C>&);
  void (*add_squares)(Accumulator<C>&, const C* x, int64_t n);
  void (*add_products)(Accumulator<C>&, const C* x, const C* y, int64_t n);
  void (*add_values)(Accumulator<C>&, const C* x, int64_t n);
  void (*finish)(Accumulator<C>&, C* sums);  // [cols]; leaves the accumulator as start does
};

template <class P>
struct StoreLeaves {
  using C = compute_t<P>;
  void (*widen)(const P* x, C* out, int64_t n);
  void (*narrow)(const C* x, P* out, int64_t n);
  void (*scale)(const C* x, P* out, int64_t n, C factor);                                // x may be out
  void (*scale_columns)(const C* x, P* out, int64_t n, const C* factors, int64_t cols);  // x may be out
};

// Of every figure of some rows (norms/measured.h): minimum, mean, maximum, root of the sum of squares. NaN where one
// is.
constexpr int kStatistics = 4;

using LookAt = void (*)(const LookArgs&);

struct Leaves {
  const char* isa;
  LookAt (*look_at)(int rule, Dtype param, Dtype grad, Dtype state);  // null: the rule does not look
  void (*(*update)(int rule, int slots, Dtype param, Dtype grad,
                   Dtype state))(const UpdateArgs&);  // null: not a triple
  void (*reduce_measured)(const float* rows, int64_t count, float* statistics);
  void (*cast_scalars)(const double* from, void* to, int count, Dtype param);
  SumLeaves<float> sum_float;
  SumLeaves<double> sum_double;
  StoreLeaves<float> store_float;
  StoreLeaves<double> store_double;
  StoreLeaves<bfloat16> store_bfloat16;
  StoreLeaves<float16> store_float16;
};

// What this library was built with and this processor can run, the best last.
struct IsaChoice {
  const char* name;
  const Leaves* leaves;
};
const IsaChoice* available_isas(int* count);
// The best of them, or the one that FASTWRS_CPU_ISA names (read once).
const Leaves& leaves();

}  // namespace fastwrs::cpu
