// A step as the op hands it to a backend, checked: plain data without torch or CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "look.h"
#include "table.h"

namespace fastwrs {

struct Dtypes {
  Dtype param, grad, state;

  bool operator==(const Dtypes& o) const { return param == o.param && grad == o.grad && state == o.state; }
};

inline bool triple_allowed(const Dtypes& dtypes) {
#define FASTWRS_TRIPLE(P, G, S) \
  if (dtypes == Dtypes{DtypeOf<P>::value, DtypeOf<G>::value, DtypeOf<S>::value}) return true;
  FASTWRS_DTYPE_TRIPLES(FASTWRS_TRIPLE)
#undef FASTWRS_TRIPLE
  return false;
}

// A number that a kernel reads: where it lies on a device, or its value.
struct Number {
  double value = 0;
  const void* data = nullptr;  // null: `value`
  Dtype dtype = Dtype::kFloat32;
};

// What a step does to one tensor, beyond the tensor itself.
struct TensorStep {
  float* step;  // finished steps; this one is *step + 1
  int64_t group;
  const double* rule_record;  // the rule's own hyperparameters
  Number lr;
  bool maximize;
  bool fresh;  // starts as in a first step though it is not
  double every, start, stop, target, rate, power;
  bool looks = false;  // the rule looks at the tensor before its weights change, if that has rows
};

struct StepJob {
  int rule;   // index in the list of rules
  int slots;  // states per tensor
  LookFacts look;
  Dtypes dtypes;
  std::vector<TensorView> tensors;
  std::vector<TensorStep> steps;
  Number grad_scale{};        // value 0 without data: none
  Number found_inf{};         // likewise
  float* measured = nullptr;  // [rows, 8], or null
  void* workspace = nullptr;  // scratch of the caller
  int64_t workspace_bytes = 0;

  // As new, but for the memory of the lists.
  void clear() {
    tensors.clear();
    steps.clear();
    grad_scale = found_inf = Number();
    measured = nullptr;
    workspace = nullptr;
    workspace_bytes = 0;
  }
};

}  // namespace fastwrs
