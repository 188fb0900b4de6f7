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
  int64_t held_bytes;                 // the longest unit that is held on chip until its norms are known
  uint32_t threads = 256;             // of a block
};

// The longest unit that is held on chip, by compute capability: two blocks of that size fit a multiprocessor, so that
// one loads while the other sums. Computed, not yet measured: whether one block would do for longer ones is to be
// tried.
struct HeldLimit {
  int capability;
  int64_t bytes;
};
constexpr HeldLimit kHeldBytes[] = {{75, 31 << 10}, {80, 81 << 10},  {86, 49 << 10},   {87, 82 << 10},
                                    {89, 49 << 10}, {90, 113 << 10}, {100, 113 << 10}, {120, 49 << 10}};
inline int64_t held_bytes(int capability, int64_t shared_per_multiprocessor) {
  for (const HeldLimit& limit : kHeldBytes) {
    if (limit.capability == capability) return limit.bytes;
  }
  return shared_per_multiprocessor / 2 - 1024;
}

enum class Phase { kLook, kStep, kFinish, kProject };

// Names one compiled kernel.
struct KernelKey {
  Phase phase;
  int rule = 0, slots = 0;  // of kLook and kStep
  Dtypes dtypes;
  bool walk;
};

// A kernel as the launcher takes it. An emulator calls it once per thread.
struct Kernel {
  const void* function;
  void (*call)(const void* params);
  size_t params_bytes;  // what of a launch's parameters it gets
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
