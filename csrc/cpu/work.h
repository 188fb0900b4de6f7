// What threads work on: one tensor, and what all tensors of a call have in common.
#pragma once

#include "../core/dtypes.h"
#include "../core/look.h"
#include "leaves.h"
#include "plan.h"

namespace fastwrs::cpu {

constexpr int kMaxScalars = 16;

// The parts of a run that depend on the type of the parameter.
template <class P>
struct Loops;
template <>
struct Loops<float> {
  static const StoreLeaves<float>& store(const Leaves& l) { return l.store_float; }
  static const SumLeaves<float>& sum(const Leaves& l) { return l.sum_float; }
};
template <>
struct Loops<double> {
  static const StoreLeaves<double>& store(const Leaves& l) { return l.store_double; }
  static const SumLeaves<double>& sum(const Leaves& l) { return l.sum_double; }
};
template <>
struct Loops<bfloat16> {
  static const StoreLeaves<bfloat16>& store(const Leaves& l) { return l.store_bfloat16; }
  static const SumLeaves<float>& sum(const Leaves& l) { return l.sum_float; }
};
template <>
struct Loops<float16> {
  static const StoreLeaves<float16>& store(const Leaves& l) { return l.store_float16; }
  static const SumLeaves<float>& sum(const Leaves& l) { return l.sum_float; }
};

// One tensor, ready to be worked on.
template <class C>
struct Work {
  TensorPlan plan;
  const TensorView* view;
  C scalars[kMaxScalars];
  bool maximize = false;
  // Rules that look first: where in the workspace is what they find out of this tensor (-1: it has no rows to look at),
  // and their own numbers for that (kGate: eps and delta; kShift: eps and lam).
  int64_t look = -1;
  C look_eps = 0, look_other = 0;
  bool unscales_late = false;  // not the first pass but the second one unscales the gradient, which it reads
};
static_assert(kMostSums == int(kSums), "a worker's sums are either");

// What all tensors of a call have in common.
template <class P>
struct Call {
  using C = compute_t<P>;
  void (*update)(const UpdateArgs&) = nullptr;  // null: parameters are projected or measured, not updated
  void (*rows)(const UpdateArgs&) = nullptr;    // the same for whole rows, of those that are projected too
  LookAt look_at = nullptr;                     // the first pass of a rule that looks
  LookFacts look;
  Dtypes dtypes{};
  double grad_scale = 0;
  bool writes = true;         // false: norms are read and nothing else
  float* measured = nullptr;  // [rows, 8]
  C* norms = nullptr;         // [rows]
  C* workspace = nullptr;
  StoreLeaves<P> store;
  SumLeaves<C> sum;

  // How many of a tensor's arrays are read: not the gradient, where there is no update.
  int arrays(const TensorView& view) const { return update ? view.arrays : 1; }
  int64_t element_size(int array) const {
    return size_of(array == 0 ? dtypes.param : array == 1 ? dtypes.grad : dtypes.state);
  }
};

// Where the arrays of a run begin.
struct Cursor {
  char* array[kMaxArrays];
  int64_t element;
};

}  // namespace fastwrs::cpu
