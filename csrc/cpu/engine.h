// The CPU backend: whole lists of tensors on threads, one pass over memory. Plain C++ without torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/job.h"

namespace fastwrs::cpu {

// How work is spread: run(n, body, context) calls body(i, context) for all i < n, on up to `count` threads.
struct Threads {
  int count = 1;
  void (*run)(int64_t n, void (*body)(int64_t i, void* context), void* context) = nullptr;
};

// The rule called `name`, or -1.
int rule_index(const std::string& name);
// Whether the rule can have so many states.
bool rule_takes_slots(int rule, int64_t slots);
// How many hyperparameters the rule has of its own, and what they are called.
int64_t rule_hypers(int rule);
const char* rule_hyper(int rule, int64_t number);

void step(const StepJob& job, const Threads& threads);
// Scales every norm group of every tensor to `target`.
void rescale(const std::vector<TensorView>& tensors, Dtype dtype, double target, const Threads& threads);
// Writes the norm of every group to `out`, of the compute type, at the tensors' norm rows.
void norms(const std::vector<TensorView>& tensors, Dtype dtype, void* out, const Threads& threads);

}  // namespace fastwrs::cpu
