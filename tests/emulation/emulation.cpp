// Runs launches block by block, each block's threads as fibers, both in a shuffled order.
#include "emulation.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "fibers.h"

namespace fastwrs::emulation {
namespace {

constexpr uint32_t kMostThreads = 1024, kWarp = 32, kGuard = 64;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kDone;
  int where = 0;
  uint32_t shuffles = 0;
  bool at_work = false;  // may have touched global memory since the last barrier
};

struct Range {
  uintptr_t begin, end;
};

struct Emulator {
  Fiber home;
  Thread threads[kMostThreads];
  uint32_t order[kMostThreads];
  uint32_t thread = 0, count = 0, block = 0, blocks = 0;
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;
  std::vector<char> shared;
  uint32_t barriers = 0;
  bool any[2] = {};
  uint64_t slots[2][kMostThreads];
  char tags[2], begun, ended;  // what orders memory, for ThreadSanitizer
  std::vector<Range> operands;
  const Range* last = nullptr;
  std::string error;
  uint64_t read = 0, written = 0, launches = 0;
  std::mt19937 random{12345};
};

Emulator& emulator() {
  static Emulator* it = new Emulator();
  return *it;
}

FASTWRS_MACHINERY void release(void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#else
  (void)tag;
#endif
}
FASTWRS_MACHINERY void acquire(void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#else
  (void)tag;
#endif
}

FASTWRS_MACHINERY void go_home() {
  Emulator& e = emulator();
  e.threads[e.thread].fiber.switch_to(e.home);
}

// Ends the block; the launch is refused once all is back home.
[[noreturn]] FASTWRS_MACHINERY void refuse(const std::string& why) {
  Emulator& e = emulator();
  e.error = "block " + std::to_string(e.block) + ", thread " + std::to_string(e.thread) + ": " + why;
  for (;;) go_home();
}

FASTWRS_MACHINERY void check(const void* address, size_t bytes, const char* what) {
  Emulator& e = emulator();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  if (begin % bytes != 0) refuse(std::string(what) + " of " + std::to_string(bytes) + " bytes at a misaligned address");
  if (e.last && e.last->begin <= begin && end <= e.last->end) return;
  const auto after = std::upper_bound(e.operands.begin(), e.operands.end(), begin,
                                      [](uintptr_t at, const Range& range) { return at < range.begin; });
  if (after != e.operands.begin() && end <= (after - 1)->end) {
    e.last = &*(after - 1);
    return;
  }
  refuse(std::string(what) + " of " + std::to_string(bytes) + " bytes out of bounds");
}

FASTWRS_MACHINERY void body() {
#if defined(__SANITIZE_ADDRESS__)
  Fiber::finish_switch(nullptr);
#endif
  Emulator& e = emulator();
  acquire(&e.begun);
  e.kernel(e.params);
  release(&e.ended);
  e.threads[e.thread].state = State::kDone;
  for (;;) go_home();
}

// Lets those go on who wait for nobody any more. False if there are none.
FASTWRS_MACHINERY bool wake() {
  Emulator& e = emulator();
  bool woken = false;
  for (uint32_t first = 0; first < e.count; first += kWarp) {
    const auto at_shuffle = [&](const Thread& t) { return t.state == State::kAtShuffle; };
    if (!std::all_of(e.threads + first, e.threads + first + kWarp, at_shuffle)) continue;
    for (uint32_t i = first; i < first + kWarp; ++i) e.threads[i].state = State::kReady;
    woken = true;
  }
  const auto at_barrier = [&](const Thread& t) { return t.state == State::kAtBarrier; };
  if (woken || !std::all_of(e.threads, e.threads + e.count, at_barrier)) return woken;
  for (uint32_t i = 0; i < e.count; ++i) {
    if (e.threads[i].where != e.threads[0].where) {
      e.error = "threads of a block are at different barriers, in lines " + std::to_string(e.threads[0].where) +
                " and " + std::to_string(e.threads[i].where);
      return false;
    }
    e.threads[i].state = State::kReady;
    e.threads[i].at_work = false;
  }
  ++e.barriers;
  e.any[e.barriers & 1] = false;
  return true;
}

FASTWRS_MACHINERY void run_block() {
  Emulator& e = emulator();
  std::fill(e.shared.begin(), e.shared.end(), char(0xff));  // NaN in every type
  std::shuffle(e.order, e.order + e.count, e.random);
  e.barriers = 0;
  e.any[0] = e.any[1] = false;
  for (uint32_t i = 0; i < e.count; ++i) {
    e.threads[i].fiber.start(&body);
    e.threads[i].state = State::kReady;
    e.threads[i].shuffles = 0;
    e.threads[i].at_work = true;
  }
  release(&e.begun);
  const auto done = [](const Thread& t) { return t.state == State::kDone; };
  while (e.error.empty()) {
    for (uint32_t i = 0; i < e.count && e.error.empty(); ++i) {
      e.thread = e.order[i];
      if (e.threads[e.thread].state == State::kReady) e.home.switch_to(e.threads[e.thread].fiber);
    }
    if (!e.error.empty() || std::all_of(e.threads, e.threads + e.count, done)) break;
    if (!wake() && e.error.empty()) e.error = "some threads of a block wait for others that never come";
  }
  acquire(&e.ended);
  for (uint32_t i = 0; i < kGuard && e.error.empty(); ++i) {
    if (e.shared[e.shared.size() - 1 - i] != char(0xff)) e.error = "written beyond the shared memory of the block";
  }
}

// The memory from the first to the last element of an array.
void add_operand(const TensorView& view, int k, int64_t size) {
  int64_t last = 0;
  for (int d = 0; d < view.dims; ++d) {
    if (view.sizes[d] == 0) return;
    last += (view.sizes[d] - 1) * view.array[k].strides[d];
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(view.array[k].data);
  emulator().operands.push_back({begin, begin + (last + 1) * size});
}

void add_operand(const void* data, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (data && bytes > 0) emulator().operands.push_back({begin, begin + bytes});
}

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* value = std::getenv(variable);
  return value ? std::strtoull(value, nullptr, 10) : otherwise;
}

}  // namespace

FASTWRS_MACHINERY uint32_t thread_index() { return emulator().thread; }
FASTWRS_MACHINERY uint32_t thread_count() { return emulator().count; }
FASTWRS_MACHINERY uint32_t block_index() { return emulator().block; }
FASTWRS_MACHINERY uint32_t block_count() { return emulator().blocks; }
FASTWRS_MACHINERY char* shared_memory() { return emulator().shared.data(); }

FASTWRS_MACHINERY void barrier(int where) { barrier_any(false, where); }

FASTWRS_MACHINERY bool barrier_any(bool flag, int where) {
  Emulator& e = emulator();
  Thread& me = e.threads[e.thread];
  const uint32_t mine = e.barriers;
  if (flag) e.any[mine & 1] = true;
  me.where = where;
  me.state = State::kAtBarrier;
  release(&e.tags[mine & 1]);
  go_home();
  acquire(&e.tags[mine & 1]);
  return e.any[mine & 1];
}

FASTWRS_MACHINERY uint64_t shuffle_xor(uint64_t x, int lanes) {
  Emulator& e = emulator();
  const uint32_t me = e.thread, turn = e.threads[me].shuffles++ & 1;
  e.slots[turn][me] = x;
  e.threads[me].state = State::kAtShuffle;
  go_home();
  return e.slots[turn][me ^ uint32_t(lanes)];
}

FASTWRS_MACHINERY uint32_t take_ticket(uint32_t* counter) {
  // Blocks run one after the other here. On a GPU the last one to come writes what a slower thread still reads, and
  // reads what a slower one has still to write.
  Emulator& e = emulator();
  for (uint32_t i = 0; i < e.count; ++i) {
    if (e.threads[i].at_work)
      refuse("a ticket is taken while thread " + std::to_string(i) + " may still read or write");
  }
  about_to_read(counter, sizeof *counter);
  return (*counter)++;
}

FASTWRS_MACHINERY void about_to_read(const void* address, size_t bytes, bool counted) {
  check(address, bytes, "a read");
  emulator().threads[emulator().thread].at_work = true;
  emulator().read += counted ? bytes : 0;
}
FASTWRS_MACHINERY void about_to_write(const void* address, size_t bytes) {
  check(address, bytes, "a write");
  emulator().threads[emulator().thread].at_work = true;
  emulator().written += bytes;
}

// What a job may touch. Called for every job, before its launches.
void set_operands(const StepJob& job) {
  Emulator& e = emulator();
  e.operands.clear();
  e.last = nullptr;
  int64_t rows = 0;
  for (const TensorView& view : job.tensors) {
    add_operand(view, 0, size_of(job.dtypes.param));
    add_operand(view, 1, size_of(job.dtypes.grad));
    for (int k = 2; k < view.arrays; ++k) add_operand(view, k, size_of(job.dtypes.state));
    if (view.reduced != 0) rows += group_count(view);
  }
  for (const TensorStep& step : job.steps) {
    add_operand(step.step, sizeof(float));
    add_operand(step.lr.data, size_of(step.lr.dtype));
  }
  for (const void* number : {job.grad_scale.data, job.found_inf.data}) add_operand(number, sizeof(float));
  add_operand(job.measured, rows * 8 * int64_t(sizeof(float)));
  add_operand(job.workspace, job.workspace_bytes);
  std::sort(e.operands.begin(), e.operands.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
}

}  // namespace fastwrs::emulation

namespace fastwrs::cuda {

std::string why_not() { return ""; }

Limits limits_of(int) {
  Limits limits{};
  limits.shared_per_block = int64_t(emulation::number_from("EMULATED_SHARED_PER_BLOCK", 232448));
  limits.shared_per_multiprocessor = int64_t(emulation::number_from("EMULATED_SHARED_PER_MULTIPROCESSOR", 233472));
  limits.held_bytes = limits.shared_per_multiprocessor / 2 - 1024;
  limits.threads = uint32_t(emulation::number_from("EMULATED_THREADS", limits.threads));
  return limits;
}

void begin(const StepJob& job) { emulation::set_operands(job); }

void run(const Launch& launch, int device, void*) {
  using namespace emulation;
  Emulator& e = emulator();
  const Kernel kernel = find_kernel(launch.key);
  const auto refuse_launch = [&](const std::string& why) {
    throw std::runtime_error("emulated " + kernel.name + ": " + why);
  };
  if (launch.shared_bytes > limits_of(device).shared_per_block)
    refuse_launch("more shared memory than a block may have");
  if (launch.blocks == 0 || launch.threads == 0 || launch.threads % kWarp != 0) refuse_launch("an impossible grid");
  e.home.adopt();
  e.kernel = kernel.call;
  // No more than a GPU would get of it; behind it lies what would be read beyond.
  std::vector<char> params(kernel.params_bytes + kGuard, char(0xff));
  std::memcpy(params.data(), launch.params, kernel.params_bytes);
  e.params = params.data();
  e.count = launch.threads;
  e.blocks = launch.blocks;
  e.shared.assign(launch.shared_bytes + kGuard, 0);
  std::iota(e.order, e.order + e.count, 0u);
  std::vector<uint32_t> blocks(launch.blocks);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), e.random);
  ++e.launches;
  e.error.clear();
  for (const uint32_t block : blocks) {
    e.block = block;
    run_block();
    if (!e.error.empty()) refuse_launch(e.error);
  }
}

}  // namespace fastwrs::cuda

// Bytes read, bytes written, launches; they start again from 0.
extern "C" __attribute__((visibility("default"))) void fastwrs_emulation_counts(uint64_t* counts) {
  auto& e = fastwrs::emulation::emulator();
  counts[0] = e.read;
  counts[1] = e.written;
  counts[2] = e.launches;
  e.read = e.written = e.launches = 0;
}
