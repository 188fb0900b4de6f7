// Launches on a real device, through a CUDA runtime of our own (linked statically): it shares the context with torch,
// and one binary serves several builds of it.
#include "launch.h"

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace fastwrs::cuda {
namespace {

constexpr int kLeastDriver = 12010;  // takes kernel parameters of 32,764 bytes

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here and not once more by somebody else
  throw std::runtime_error("fastwrs: " + what + ": " + cudaGetErrorString(error));
}

// Whether anybody uses a device. Making one current that nobody does would create a context on it.
bool has_context(int device) {
  using State = int (*)(int, unsigned*, int*);
  static const State state = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<State>(found);
  }();
  unsigned flags = 0;
  int active = 0;
  return state && state(device, &flags, &active) == 0 && active != 0;
}

// Makes a device current, and the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cannot ask for the current device");
    if (before_ != device_) check(cudaSetDevice(device_), "cannot use device " + std::to_string(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_ && has_context(before_)) cudaSetDevice(before_);
  }

 private:
  int device_, before_ = 0;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cannot ask device " + std::to_string(device));
  return value;
}

// Whether the library has code for a compute capability. FASTWRS_CUDA_ARCHES is a list like v0750v0800v1201: major,
// minor, and 1 where there is PTX too, which runs on everything newer.
bool built_for(int major, int minor) {
#define FASTWRS_TEXT_(x) #x
#define FASTWRS_TEXT(x) FASTWRS_TEXT_(x)
  for (const char* at = FASTWRS_TEXT(FASTWRS_CUDA_ARCHES); *at == 'v'; at += 5) {
    const int built_major = (at[1] - '0') * 10 + (at[2] - '0'), built_minor = at[3] - '0';
    const bool ptx = at[4] == '1';
    if (built_major == major && built_minor <= minor) return true;
    if (ptx && (built_major < major || (built_major == major && built_minor <= minor))) return true;
  }
  return false;
}

std::string name_of(const Launch& launch, const Kernel& kernel) {
  static const char* const kNames[] = {"float32", "float64", "bfloat16", "float16"};
  const Dtypes& d = launch.key.dtypes;
  return kernel.name + " for (" + kNames[int(d.param)] + ", " + kNames[int(d.grad)] + ", " + kNames[int(d.state)] +
         ")" + (launch.key.walk ? ", strided" : "") + ", " + std::to_string(launch.blocks) + " blocks of " +
         std::to_string(launch.threads) + " threads, " + std::to_string(launch.shared_bytes) +
         " bytes of shared memory";
}

}  // namespace

std::string why_not() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no CUDA driver";
  const std::string version = std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  if (driver < kLeastDriver) return "the CUDA driver is too old: " + version + ", 12.1 is the first that will do";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("CUDA finds no device: ") + cudaGetErrorString(error) + " (driver " + version + ")";
  }
  if (devices == 0) return "there is no CUDA device";
  // By number, for asking the runtime for a kernel would make a context on every device.
  std::string found;
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (built_for(major, minor)) return "";
    found += (found.empty() ? "" : ", ") + std::to_string(major) + "." + std::to_string(minor);
  }
  return "it was not built for the compute capability of any device here (" + found + ")";
}

Limits limits_of(int device) {
  static std::mutex mutex;
  static std::vector<Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (int(known.size()) <= device) known.resize(device + 1, Limits{0, 0});
  Limits& limits = known[device];
  if (limits.shared_per_block == 0) {
    limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    const int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                           attribute(cudaDevAttrComputeCapabilityMinor, device);
    limits.held_bytes = held_bytes(capability, limits.shared_per_multiprocessor);
    limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return limits;
}

void begin(const StepJob&) {}

// Lets a kernel have all the shared memory that a block of this device may have: once, and never less again, because
// other threads launch it too.
static void grant_shared_memory(const Launch& launch, const Kernel& kernel, int device) {
  constexpr uint32_t kGranted = 48 * 1024;  // what every kernel may have without asking
  if (launch.shared_bytes <= kGranted) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> known;
  const int all = int(limits_of(device).shared_per_block);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.count({kernel.function, device})) return;
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, all),
        "no shared memory for " + name_of(launch, kernel));
  known.insert({kernel.function, device});
}

void run(const Launch& launch, int device, void* stream) {
  const DeviceGuard guard(device);
  const Kernel kernel = find_kernel(launch.key);
  grant_shared_memory(launch, kernel, device);
  void* arguments[] = {const_cast<char*>(launch.params)};
  check(cudaLaunchKernel(kernel.function, dim3(launch.blocks), dim3(launch.threads), arguments, launch.shared_bytes,
                         static_cast<cudaStream_t>(stream)),
        "cannot launch " + name_of(launch, kernel));
}

}  // namespace fastwrs::cuda
