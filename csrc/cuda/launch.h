// The CUDA backend: whole lists of tensors in few launches. Plain C++ without torch.
#pragma once

#include <cstdint>
#include <string>

#include "../core/job.h"

namespace fastwrs::cuda {

// Why no kernel can run here; empty if they can. Looks at the driver and the devices, and creates nothing on them.
std::string why_not();

// What a step needs: bytes of workspace, zeroed before the first step that uses them, and how many launches it takes.
struct Needs {
  int64_t workspace_bytes = 0, launches = 0;
};
Needs needs(const StepJob& job, int device);

// Raises what `step` would raise before its first launch.
void check(const StepJob& job, int device);

// Launches a step on a stream and returns at once; waits for nothing, allocates nothing on the device.
void step(const StepJob& job, int device, void* stream);

}  // namespace fastwrs::cuda
