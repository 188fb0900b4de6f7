// Schemas and registration: with bindings_tensors.h, the only C++ that knows torch (LibTorch's stable ABI) and Python
// (the limited API).
// An op checks all that it was given before it hands plain pointers to the backend, so that an error leaves everything
// as it was.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <dlfcn.h>

#include <string>
#include <vector>

#include "bindings_kept.h"
#include "bindings_tensors.h"
#include "cpu/engine.h"
#include "cpu/leaves.h"
#include "cuda/launch.h"
#include "norms/looks.h"
#include "norms/measured.h"
#include "rules/all.h"
#include "triton/table.h"

// A function of a library that the process has loaded, null if there is none. A Python extension's libraries are not in
// the global scope, so they are asked by name.
extern "C" __attribute__((visibility("default"))) void* fastwrs_find_symbol(const char* library, const char* name) {
  void* loaded = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
  void* found = loaded ? dlsym(loaded, name) : nullptr;
  return found ? found : dlsym(RTLD_DEFAULT, name);
}

namespace fastwrs {
namespace {

// The common part of a hyperparameter record; fastwrs/spec.py names the same in the same order.
enum Common { kLr, kLrTensor, kMaximize, kEvery, kStart, kStop, kTarget, kRate, kPower, kCommon };
constexpr const char* kCommonNames[] = {"lr",   "lr_tensor", "maximize", "every", "start",
                                        "stop", "target",    "rate",     "power"};
static_assert(sizeof(kCommonNames) / sizeof(kCommonNames[0]) == kCommon, "names and numbers of the common record");

cpu::Threads torch_threads() {
  cpu::Threads threads;
  threads.count = std::max<int>(1, int(torch::stable::get_num_threads()));
  threads.run = [](int64_t n, void (*body)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, context);
    });
  };
  return threads;
}

struct StepArgs {
  std::string rule;
  Handles params, grads, given_states, given_steps;
  KeptList kept_states, kept_steps;
  std::vector<double> hyper;
  std::vector<int64_t> groups, axes, fresh;
  Handles lrs;
  Handle grad_scale, found_inf, measured, workspace;
  bool dry_run;

  explicit StepArgs(StableIValue* stack)
      : rule(take_string(stack[0])),
        params(take_tensors(stack[1])),
        grads(take_tensors(stack[2])),
        given_states(take_tensors(stack[3])),
        given_steps(take_tensors(stack[4])),
        hyper(to<std::vector<double>>(stack[5])),
        groups(to<std::vector<int64_t>>(stack[6])),
        axes(to<std::vector<int64_t>>(stack[7])),
        fresh(to<std::vector<int64_t>>(stack[8])),
        lrs(take_tensors(stack[9])),
        grad_scale(take_optional_tensor(stack[10])),
        found_inf(take_optional_tensor(stack[11])),
        measured(take_optional_tensor(stack[12])),
        workspace(take_optional_tensor(stack[13])),
        dry_run(to<bool>(stack[14])) {}

  const Handles& states() const { return kept_states ? *kept_states : given_states; }
  const Handles& steps() const { return kept_steps ? *kept_steps : given_steps; }
  // Lists that are named, where there are any, in the place of those that are given.
  void find_kept(int64_t number_of_states, int64_t number_of_steps) {
    kept_states = kept_list(number_of_states, given_states, "states");
    kept_steps = kept_list(number_of_steps, given_steps, "steps");
  }
};

struct ProjectArgs {
  Handles tensors;
  std::vector<int64_t> axes;

  explicit ProjectArgs(StableIValue* stack)
      : tensors(take_tensors(stack[0])), axes(to<std::vector<int64_t>>(stack[1])) {}
};
struct RescaleArgs : ProjectArgs {
  double target;

  explicit RescaleArgs(StableIValue* stack) : ProjectArgs(stack), target(to<double>(stack[2])) {}
};
struct NormsArgs : ProjectArgs {
  Handle out;

  explicit NormsArgs(StableIValue* stack) : ProjectArgs(stack), out(to<AtenTensorHandle>(stack[2])) {}
};
struct ReduceArgs {
  Handle measured;
  std::vector<int64_t> counts;
  Handle out;

  explicit ReduceArgs(StableIValue* stack)
      : measured(to<AtenTensorHandle>(stack[0])),
        counts(to<std::vector<int64_t>>(stack[1])),
        out(to<AtenTensorHandle>(stack[2])) {}
};
struct KeepArgs {
  Handles tensors;

  explicit KeepArgs(StableIValue* stack) : tensors(take_tensors(stack[0])) {}
};
struct TableArgs : StepArgs {
  std::vector<double> constants;
  std::vector<int64_t> sizes;
  bool walk;
  Handle table;

  explicit TableArgs(StableIValue* stack)
      : StepArgs(stack),
        constants(to<std::vector<double>>(stack[15])),
        sizes(to<std::vector<int64_t>>(stack[16])),
        walk(to<bool>(stack[17])),
        table(to<AtenTensorHandle>(stack[18])) {}
};

// For arguments that stand for a result that is nowhere yet. Torch would hand over a copy: what is written there is
// lost (torch fails to copy it back, after the step), and an address in a table is soon that of something else.
template <class Args>
void refuse_without_memory(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  const Args taken(stack);
  fail(
      "a tensor among the arguments is a view with the negative bit set, or zeros without memory: resolve_neg() or "
      "clone() gives it memory of its own");
}

// Keeps a list of tensors that steps write, for these to name it.
void keep(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 1) fail("fastwrs::keep takes 1 argument, got ", inputs);
  stack[0] = from(KeptLists::all().keep(KeepArgs(stack).tensors));
}

// Where the numbers are that a step reads, and which kernels it runs.
enum class Kernels { kCpu, kDevice };

// The numbers of the records, whether they are used or not.
void check_records(const StepArgs& a, int rule, int64_t record) {
  for (int64_t k = 0; k < int64_t(a.hyper.size()); ++k) {
    const double value = a.hyper[k];
    const int64_t number = k % record;
    if (is_finite(value) || (number == kStop && value > 0)) continue;  // an infinite stop: the window never closes
    const char* name = number < kCommon ? kCommonNames[number] : cpu::rule_hyper(rule, number - kCommon);
    fail("hyper[", k, "] (", name, " of record ", k / record, ") is ", value);
  }
  for (int64_t k = kLrTensor; k < int64_t(a.hyper.size()); k += record) {
    const double index = a.hyper[k];
    if (index != whole(index)) fail("hyper[", k, "] (lr_tensor of record ", k / record, ") is ", index);
    if (!(index < double(a.lrs.size()))) fail("lr_tensor ", index, " but there are ", a.lrs.size(), " lrs");
  }
}

// Fills what the job does to tensor i, apart from the tensor itself.
TensorStep tensor_step(const StepArgs& a, int64_t i, int64_t record, const std::vector<Number>& lrs, const Place& place,
                       Kernels kernels, Memory& memory) {
  const int64_t rows = int64_t(a.hyper.size()) / record, row = a.groups[i];
  if (row < 0 || row >= rows) fail("groups[", i, "] = ", row, " but there are ", rows, " records");
  const double* h = a.hyper.data() + row * record;
  const Facts step = describe(a.steps()[i], "steps", i, place);
  if (step.dims != 0 || step.dtype != Dtype::kFloat32) fail("steps[", i, "] must be a 0-d float32");
  if (kernels == Kernels::kCpu) {
    const float finished = *static_cast<const float*>(step.data);
    if (!(finished >= 0) || !is_finite(finished)) fail("steps[", i, "] is ", finished, ", not a count");
  }
  memory.writes(step, "steps", i);
  return {static_cast<float*>(step.data),
          row,
          h + kCommon,
          h[kLrTensor] < 0 ? Number{h[kLr]} : lrs[size_t(h[kLrTensor])],
          h[kMaximize] != 0,
          false,
          h[kEvery],
          h[kStart],
          h[kStop],
          h[kTarget],
          h[kRate],
          h[kPower]};
}

// Checks all that was given, and fills the job with it. False if there is nothing to do. `table`: what else is written.
bool fill_job(const StepArgs& a, const Place& place, Kernels kernels, StepJob& job, const Facts* table = nullptr) {
  const int64_t n = int64_t(a.params.size());
  job.clear();
  job.rule = cpu::rule_index(a.rule);
  if (job.rule < 0) fail("unknown rule \"", a.rule, "\"");
  // What is not read need not be handed over.
  const Handles& grads = a.grads.empty() && !updates(job.rule) ? a.params : a.grads;
  if (int64_t(grads.size()) != n || int64_t(a.steps().size()) != n || int64_t(a.groups.size()) != n ||
      int64_t(a.axes.size()) != n) {
    fail("grads, steps, groups and axes must have one entry for each of the ", n, " params");
  }
  for (const int64_t i : a.fresh) {
    if (i < 0 || i >= n) fail("fresh names params[", i, "] but there are ", n);
  }
  if (n == 0 && !a.states().empty()) fail("there are ", a.states().size(), " states for no params");
  if (n == 0) return false;
  const int64_t slots = int64_t(a.states().size()) / n, record = kCommon + cpu::rule_hypers(job.rule);
  if (int64_t(a.states().size()) != slots * n || !cpu::rule_takes_slots(job.rule, slots)) {
    fail("rule \"", a.rule, "\" cannot have ", a.states().size(), " states for ", n, " params");
  }
  if (a.hyper.empty() || int64_t(a.hyper.size()) % record != 0) {
    fail("hyper must hold records of ", record, " numbers, it holds ", a.hyper.size());
  }
  if (a.grad_scale.get() && !updates(job.rule)) fail("rule \"", a.rule, "\" has no gradient to unscale by grad_scale");
  check_records(a, job.rule, record);
  job.slots = int(slots);
  job.look = look_facts(look_of(job.rule));

  Memory memory(size_t(n * (slots + 3)) + a.lrs.size() + 5);
  const auto number = [&](const Handle& tensor, const char* what, bool may_be_double, int64_t i) {
    const Facts f = describe(tensor, what, i, place);
    memory.reads(f, what, i);
    return kernels == Kernels::kDevice ? number_of(f, what, may_be_double, i) : Number{number_in(f, what, i)};
  };
  std::vector<Number> lrs;
  for (size_t i = 0; i < a.lrs.size(); ++i) {
    lrs.push_back(number(a.lrs[i], "lrs", true, int64_t(i)));
    if (!is_finite(lrs[i].value)) fail("lrs[", i, "] is ", lrs[i].value);
  }
  if (a.grad_scale.get()) {
    job.grad_scale = number(a.grad_scale, "grad_scale", false, 0);
    const double scale = job.grad_scale.value;
    if (kernels == Kernels::kCpu && !(scale > 0 && is_finite(scale))) fail("grad_scale must be > 0, got ", scale);
  }
  if (a.found_inf.get()) job.found_inf = number(a.found_inf, "found_inf", false, 0);

  job.tensors.assign(n, TensorView());
  job.steps.reserve(n);
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (const Handles* list : {&a.params, &grads, &a.steps()}) list->ahead(i);
    for (int64_t k = 0; k < slots; ++k) a.states().ahead(k * n + i);
    const Facts param = describe(a.params[i], "params", i, place);
    const Facts grad = &grads == &a.params ? param : describe(grads[i], "grads", i, place);
    check_same_shape(grad, param, "grads", i);
    memory.writes(param, "params", i);
    if (a.grad_scale.get()) memory.writes(grad, "grads", i);
    if (overlaps(param)) fail("params[", i, "] overlaps itself in memory");
    if (a.grad_scale.get() && overlaps(grad)) fail("grads[", i, "] overlaps itself in memory and is to be unscaled");
    TensorView& view = job.tensors[i];
    view.dims = int(param.dims);
    view.sizes = param.sizes;
    add_array(view, param);
    add_array(view, grad);
    // A gradient that is not read may be of any kind.
    Dtypes dtypes{param.dtype, updates(job.rule) ? grad.dtype : param.dtype,
                  param.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32};
    for (int64_t s = 0; s < slots; ++s) {
      const Facts state = describe(a.states()[s * n + i], "states", s * n + i, place);
      check_same_shape(state, param, "states", s * n + i);
      if (overlaps(state)) fail("states[", s * n + i, "] overlaps itself in memory");
      if (s > 0 && state.dtype != dtypes.state) fail("states of params[", i, "] have different dtypes");
      dtypes.state = state.dtype;
      memory.writes(state, "states", s * n + i);
      add_array(view, state);
    }
    if (i == 0) job.dtypes = dtypes;
    if (!triple_allowed(dtypes)) fail("params[", i, "]: dtypes of parameter, gradient and state do not go together");
    if (dtypes.param != job.dtypes.param || dtypes.grad != job.dtypes.grad || dtypes.state != job.dtypes.state) {
      fail("params[", i, "] and params[0] have different dtypes; one call takes one dtype triple");
    }
    rows += set_groups(view, a.axes[i], rows, i);
    job.steps.push_back(tensor_step(a, i, record, lrs, place, kernels, memory));
    job.steps[i].looks = looks(job.rule, job.steps[i].rule_record);
  }
  for (const int64_t i : a.fresh) job.steps[i].fresh = true;
  if (a.measured.get()) {
    const Facts f = buffer(a.measured, "measured", Dtype::kFloat32, rows * kMeasured, place);
    memory.writes(f, "measured", 0);
    job.measured = static_cast<float*>(f.data);
  }
  if (a.workspace.get()) {
    const Facts f = buffer(a.workspace, "workspace", Dtype::kFloat32, 0, place);
    const int64_t element = job.dtypes.param == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
    if (kernels == Kernels::kDevice && f.begin() % element != 0) fail("workspace is not aligned to the sums in it");
    memory.writes(f, "workspace", 0);
    job.workspace = f.data;
    job.workspace_bytes = f.bytes;
  }
  if (table) memory.writes(*table, "table", 0);
  memory.check();
  return true;
}

// Kept, for a long list costs more to allocate than to fill.
StepJob& job_to_fill() {
  static thread_local StepJob job;
  return job;
}

[[maybe_unused]] void step_on_cpu(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 17) fail("fastwrs::step takes 17 arguments, got ", inputs);
  StepArgs a(stack);
  a.find_kept(to<int64_t>(stack[15]), to<int64_t>(stack[16]));
  StepJob& job = job_to_fill();
  if (!fill_job(a, Place::cpu(), Kernels::kCpu, job) || a.dry_run || job.found_inf.value != 0) return;
  cpu::step(job, torch_threads());
}

#ifdef FASTWRS_WITH_CUDA
constexpr const char *kTorchCuda = "libtorch_cuda.so", *kCurrentStream = "aoti_torch_get_current_cuda_stream";

// The stream that torch's work goes to now. Looked up by name, so that the library loads beside a torch without CUDA.
void* current_stream(const Place& place) {
#ifdef FASTWRS_EMULATED
  (void)place;
  return nullptr;
#else
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = reinterpret_cast<Get>(fastwrs_find_symbol(kTorchCuda, kCurrentStream));
  if (!get) fail("this torch has no ", kCurrentStream);  // cuda_why_not has said so before
  void* stream = nullptr;
  call(get(place.index, &stream));
  return stream;
#endif
}

void step_on_cuda(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 17) fail("fastwrs::step takes 17 arguments, got ", inputs);
  StepArgs a(stack);
  a.find_kept(to<int64_t>(stack[15]), to<int64_t>(stack[16]));
  const Place place = a.params.empty() ? Place::cpu() : Place::of(a.params[0]);
  StepJob& job = job_to_fill();
  if (!fill_job(a, place, Kernels::kDevice, job)) return;
  if (a.dry_run) return cuda::check(job, place.index);
  cuda::step(job, place.index, current_stream(place));
}

// What a step needs and does: bytes of zeroed workspace, and launches.
void step_plan(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 15) fail("fastwrs::step_plan takes 15 arguments, got ", inputs);
  cuda::Needs needs;
  {
    const StepArgs a(stack);
    const Place place = a.params.empty() ? Place::cpu() : Place::of(a.params[0]);
    StepJob& job = job_to_fill();
    if (fill_job(a, place, Kernels::kDevice, job)) needs = cuda::needs(job, place.index);
  }
  stack[0] = from(needs.workspace_bytes);
  stack[1] = from(needs.launches);
}
#endif

// Checks what a step was given, and brings the table of the Triton kernels up to date. Kept on the host; how much of it
// has changed is returned, with what the launches need.
void triton_table(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 19) fail("fastwrs::triton_table takes 19 arguments, got ", inputs);
  triton::Needs needs;
  {
    const TableArgs a(stack);
    const Place place = a.params.empty() ? Place::cpu() : Place::of(a.params[0]);
    const Facts table = words_in(a.table, "table");
    StepJob& job = job_to_fill();
    if (fill_job(a, place, Kernels::kDevice, job, &table)) {
      const auto fits = [](int64_t size) { return 0 < size && size <= triton::kLargestSize; };
      if (int64_t(a.sizes.size()) != triton::kSizes || !std::all_of(a.sizes.begin(), a.sizes.end(), fits)) {
        fail("sizes must be ", triton::kSizes, " numbers from 1 to ", triton::kLargestSize);
      }
      const int64_t record = kCommon + cpu::rule_hypers(job.rule), rows = int64_t(a.hyper.size()) / record;
      const int64_t own = int64_t(a.constants.size()) / rows;
      if (own * rows != int64_t(a.constants.size()))
        fail("constants must be as many for each of the ", rows, " records");
      std::vector<double> records;
      for (int64_t row = 0; row < rows; ++row) {
        const double* h = a.hyper.data() + row * record;
        records.insert(records.end(), {h[kLr], h[kMaximize]});
        records.insert(records.end(), h + kEvery, h + kCommon);
        records.insert(records.end(), a.constants.begin() + row * own, a.constants.begin() + (row + 1) * own);
      }
      const triton::Sizes sizes{a.sizes[0], a.sizes[1], a.sizes[2], a.sizes[3]};
      int64_t* words = static_cast<int64_t*>(table.data);
      needs = triton::fill_table(job, records, kCommon - 1 + own, sizes, a.walk, words, table.numel);
    }
  }
  stack[0] = from(needs.words);
  stack[1] = from(needs.changed);
  stack[2] = from(needs.workspace_bytes);
  stack[3] = from(needs.tiles);
  stack[4] = from(needs.project_tiles);
  stack[5] = from(needs.gate_tiles);
  stack[6] = from(needs.tensors);
  stack[7] = from(needs.others);
  stack[8] = from(needs.walked_gates);
}

void triton_layout(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(triton::layout()); }

// Why the CUDA kernels cannot run; empty if they can.
void cuda_why_not(StableIValue* stack, uint64_t, uint64_t) {
#ifdef FASTWRS_WITH_CUDA
  std::string why = cuda::why_not();
#ifndef FASTWRS_EMULATED
  if (why.empty() && !fastwrs_find_symbol(kTorchCuda, kCurrentStream)) {
    why = std::string("this torch has no ") + kCurrentStream + ": it was built without CUDA";
  }
#endif
  stack[0] = from(why);
#else
  stack[0] = from(std::string("fastwrs was built without CUDA: there was no nvcc"));
#endif
}

// The views of a list of tensors of one dtype with norm groups.
std::vector<TensorView> group_views(const ProjectArgs& a, bool written, Memory& memory, Dtype& dtype, int64_t& rows) {
  const auto& [tensors, axes] = a;
  if (axes.size() != tensors.size()) fail("axes must have one entry for each of the ", tensors.size(), " tensors");
  std::vector<TensorView> views(tensors.size());
  rows = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Facts f = describe(tensors[i], "tensors", int64_t(i));
    if (i == 0) dtype = f.dtype;
    if (f.dtype != dtype) fail("tensors[", i, "] and tensors[0] have different dtypes; one call takes one dtype");
    if (written && overlaps(f)) fail("tensors[", i, "] overlaps itself in memory");
    written ? memory.writes(f, "tensors", int64_t(i)) : memory.reads(f, "tensors", int64_t(i));
    if (axes[i] == 0) fail("axes[", i, "] = 0: a norm group must span at least one dimension");
    views[i].dims = int(f.dims);
    views[i].sizes = f.sizes;
    add_array(views[i], f);
    rows += set_groups(views[i], axes[i], rows, int64_t(i));
  }
  return views;
}

void rescale(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 3) fail("fastwrs::rescale_ takes 3 arguments, got ", inputs);
  const RescaleArgs a(stack);
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0;
  Memory memory(a.tensors.size());
  const auto views = group_views(a, true, memory, dtype, rows);
  if (!(a.target > 0) || !is_finite(a.target)) fail("target must be finite and > 0, got ", a.target);
  memory.check();
  if (!views.empty()) cpu::rescale(views, dtype, a.target, torch_threads());
}

void channel_norms(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 3) fail("fastwrs::channel_norms takes 3 arguments, got ", inputs);
  const NormsArgs a(stack);
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0;
  Memory memory(a.tensors.size() + 1);
  const auto views = group_views(a, false, memory, dtype, rows);
  const Facts out = buffer(a.out, "out", dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32, rows);
  memory.writes(out, "out", 0);
  memory.check();
  if (!views.empty()) cpu::norms(views, dtype, out.data, torch_threads());
}

// Of every tensor's rows in a buffer of what was measured, and every figure: minimum, mean, maximum and the root of the
// sum of squares.
void reduce_measured(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 3) fail("fastwrs::reduce_measured takes 3 arguments, got ", inputs);
  const ReduceArgs a(stack);
  const auto& counts = a.counts;
  int64_t rows = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 1) fail("counts[", i, "] must be > 0, got ", counts[i]);
    if (counts[i] > kMaxGroups - rows) fail("counts[", i, "] = ", counts[i], " is more rows than there can be");
    rows += counts[i];
  }
  const int64_t tensors = int64_t(counts.size());
  const Facts measured = buffer(a.measured, "measured", Dtype::kFloat32, rows * kMeasured);
  const Facts out = buffer(a.out, "out", Dtype::kFloat32, tensors * cpu::kStatistics * kMeasured);
  Memory memory(2);
  memory.reads(measured, "measured", 0);
  memory.writes(out, "out", 0);
  memory.check();
  const auto* row = static_cast<const float*>(measured.data);
  auto* found = static_cast<float*>(out.data);
  for (int64_t i = 0; i < tensors; ++i) {
    cpu::leaves().reduce_measured(row, counts[i], found + i * cpu::kStatistics * kMeasured);
    row += counts[i] * kMeasured;
  }
}

// One line per rule: name, hyperparameters and slots; first the common record. Compared with fastwrs/spec.py by a test.
void rules(StableIValue* stack, uint64_t, uint64_t) {
  std::string text = "common:";
  for (const char* name : kCommonNames) text += std::string(" ") + name;
#define FASTWRS_RULE(Rule)                                                \
  text += std::string("\n") + Rule::kName + ":";                          \
  for (const char* name : Rule::kHypers) text += std::string(" ") + name; \
  text += " |";                                                           \
  for (const char* name : Rule::kSlots) text += std::string(" ") + name;
  FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
  stack[0] = from(text);
}

// The instruction set in use, then those that this processor can run.
void cpu_isa(StableIValue* stack, uint64_t, uint64_t) {
  std::string text = cpu::leaves().isa;
  int count = 0;
  const cpu::IsaChoice* choices = cpu::available_isas(&count);
  for (int i = 0; i < count; ++i) text += std::string(" ") + choices[i].name;
  stack[0] = from(text);
}

}  // namespace
}  // namespace fastwrs

STABLE_TORCH_LIBRARY(fastwrs, m) {
  m.def(
      "step(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, float[] hyper, "
      "int[] groups, int[] axes, int[] fresh, Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, Tensor(e!)? "
      "measured, Tensor(f!)? workspace, bool dry_run=False, int kept_states=0, int kept_steps=0) -> ()");
  m.def("keep(Tensor[] tensors) -> int");
  m.def(
      "step_plan(str rule, Tensor[] params, Tensor[] grads, Tensor[] states, Tensor[] steps, float[] hyper, int[] "
      "groups, int[] axes, int[] fresh, Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, Tensor? measured, Tensor? "
      "workspace, bool dry_run=False) -> (int, int)");
  m.def("cuda_why_not() -> str");
  m.def(
      "triton_table(str rule, Tensor[] params, Tensor[] grads, Tensor[] states, Tensor[] steps, float[] hyper, int[] "
      "groups, int[] axes, int[] fresh, Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, Tensor? measured, Tensor? "
      "workspace, bool dry_run, float[] constants, int[] sizes, bool walk, Tensor(a!) table) -> (int, int, int, int, "
      "int, int, int, int, int)");
  m.def("triton_layout() -> str");
  m.def("rescale_(Tensor(a!)[] tensors, int[] axes, float target) -> ()");
  m.def("channel_norms(Tensor[] tensors, int[] axes, Tensor(a!) out) -> ()");
  m.def("reduce_measured(Tensor measured, int[] counts, Tensor(a!) out) -> ()");
  m.def("rules() -> str");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastwrs, CPU, m) {
#ifdef FASTWRS_EMULATED
  m.impl("step", &fastwrs::step_on_cuda);
  m.impl("step_plan", &fastwrs::step_plan);
#else
  m.impl("step", &fastwrs::step_on_cpu);
#endif
  m.impl("reduce_measured", &fastwrs::reduce_measured);
  m.impl("rescale_", &fastwrs::rescale);
  m.impl("channel_norms", &fastwrs::channel_norms);
}

#if defined(FASTWRS_WITH_CUDA) && !defined(FASTWRS_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(fastwrs, CUDA, m) {
  m.impl("step", &fastwrs::step_on_cuda);
  m.impl("step_plan", &fastwrs::step_plan);
}
#endif

#define FASTWRS_REFUSE(m)                                                          \
  m.impl("step", &fastwrs::refuse_without_memory<fastwrs::StepArgs>);              \
  m.impl("step_plan", &fastwrs::refuse_without_memory<fastwrs::StepArgs>);         \
  m.impl("triton_table", &fastwrs::refuse_without_memory<fastwrs::TableArgs>);     \
  m.impl("rescale_", &fastwrs::refuse_without_memory<fastwrs::RescaleArgs>);       \
  m.impl("channel_norms", &fastwrs::refuse_without_memory<fastwrs::NormsArgs>);    \
  m.impl("reduce_measured", &fastwrs::refuse_without_memory<fastwrs::ReduceArgs>); \
  m.impl("keep", &fastwrs::refuse_without_memory<fastwrs::KeepArgs>);
STABLE_TORCH_LIBRARY_IMPL(fastwrs, Negative, m){FASTWRS_REFUSE(m)} STABLE_TORCH_LIBRARY_IMPL(fastwrs, ZeroTensor,
                                                                                             m){FASTWRS_REFUSE(m)}
#undef FASTWRS_REFUSE

STABLE_TORCH_LIBRARY_IMPL(fastwrs, CompositeExplicitAutograd, m) {
  m.impl("keep", &fastwrs::keep);
  m.impl("cuda_why_not", &fastwrs::cuda_why_not);
  m.impl("triton_table", &fastwrs::triton_table);
  m.impl("triton_layout", &fastwrs::triton_layout);
  m.impl("rules", &fastwrs::rules);
  m.impl("cpu_isa", &fastwrs::cpu_isa);
}

// Importing the module loads the library and with it the ops above. The end of a list that is kept is no op: it comes
// when Python frees an object, which may be while somebody traces the ops of something else.
extern "C" PyObject* fastwrs_forget(PyObject* /*module*/, PyObject* number) {
  const long long kept = PyLong_AsLongLong(number);
  if (PyErr_Occurred()) return nullptr;
  fastwrs::KeptLists::all().forget(kept);
  Py_RETURN_NONE;
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"forget", &fastwrs_forget, METH_O, "Ends a list that torch.ops.fastwrs.keep has made."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
