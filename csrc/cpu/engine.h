// The CPU backend: whole lists of tensors on threads, one pass over memory. Plain C++ without torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/table.h"
#include "../norms/projection.h"

namespace fastwrs::cpu {

// How work is spread: run(n, body, context) calls body(i, context) for all i < n, on up to `count` threads.
struct Threads {
  int count = 1;
  void (*run)(int64_t n, void (*body)(int64_t i, void* context), void* context) = nullptr;
};

struct Dtypes {
  Dtype param, grad, state;
};

// What a step does to one tensor, beyond the tensor itself.
struct TensorStep {
  float* step;                // finished steps; this one is *step + 1
  const double* rule_record;  // the rule's own hyperparameters
  double lr;
  bool maximize;
  bool fresh;  // starts as in a first step though it is not
  double every, start, stop, target, rate, power;
};

struct StepJob {
  int rule;   // index in the list of rules
  int slots;  // states per tensor
  Dtypes dtypes;
  std::vector<TensorView> tensors;
  std::vector<TensorStep> steps;
  double grad_scale = 0;      // 0: none
  float* measured = nullptr;  // [rows, 8], or null
  void* workspace = nullptr;  // scratch of the caller, used if it is large enough
  int64_t workspace_bytes = 0;

  // As new, but for the memory of the lists.
  void clear() {
    tensors.clear();
    steps.clear();
    grad_scale = 0;
    measured = nullptr;
    workspace = nullptr;
    workspace_bytes = 0;
  }
};

// The rule called `name`, or -1.
int rule_index(const char* name);
// Whether the rule can have so many states.
bool rule_takes_slots(int rule, int64_t slots);
// Number of the rule's own hyperparameters.
int64_t rule_hypers(int rule);
bool triple_allowed(const Dtypes& dtypes);

void step(const StepJob& job, const Threads& threads);
// Scales every norm group of every tensor to `target`.
void rescale(const std::vector<TensorView>& tensors, Dtype dtype, double target, const Threads& threads);
// Writes the norm of every group to `out`, of the compute type, at the tensors' norm rows.
void norms(const std::vector<TensorView>& tensors, Dtype dtype, void* out, const Threads& threads);

}  // namespace fastwrs::cpu
