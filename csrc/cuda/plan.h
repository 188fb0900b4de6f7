// From a checked list of tensors to launches: how each tensor is cut into tiles, and which tensors go together.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../core/job.h"
#include "params.h"

namespace fastwrs::cuda {

// What a device has, as far as the cutting depends on it.
struct Limits {
  int64_t shared_per_block;           // bytes that a block may ask for
  int64_t shared_per_multiprocessor;  // and all blocks of a multiprocessor together
  uint32_t threads = 256;             // of a block
};

enum class Phase { kStep, kFinish, kProject };

// Names one compiled kernel.
struct KernelKey {
  Phase phase;
  int rule = 0, slots = 0;  // of kStep
  Dtypes dtypes;
  bool walk;
};

// A kernel as the launcher takes it. An emulator calls it once per thread.
struct Kernel {
  const void* function;
  void (*call)(const void* params);
  std::string name;
};
Kernel find_kernel(const KernelKey& key);

struct Launch {
  KernelKey key;
  uint32_t blocks, threads, shared_bytes;
  // Params<kArrays>, with room for the largest. Kept and filled anew, since it is written in every step.
  alignas(8) char params[kParamBytes];
};

// The launches of a step, in their order.
class Plan {
 public:
  Plan(const StepJob& job, const Limits& limits);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t workspace_bytes() const { return workspace_bytes_; }
  size_t size() const { return launches_.size(); }
  const Launch& operator[](size_t i) const { return *launches_[i]; }

 private:
  std::vector<std::unique_ptr<Launch>> launches_;
  int64_t workspace_bytes_ = 0;
};

// Defined beside the launcher, for a real device or an emulated one.
Limits limits_of(int device);
void begin(const StepJob& job);  // before the launches of a step; for an emulator, which checks every address
void run(const Launch& launch, int device, void* stream);

}  // namespace fastwrs::cuda
