// Schemas and registration: with bindings_tensors.h, the only C++ that knows torch (LibTorch's stable ABI) and Python
// (the limited API).
// An op checks all that it was given before it hands plain pointers to the backend, so that an error leaves everything
// as it was.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <dlfcn.h>

#include <string>
#include <vector>

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
  std::vector<Handle> params, grads, states, steps;
  std::vector<double> hyper;
  std::vector<int64_t> groups, axes, fresh;
  std::vector<Handle> lrs;
  Handle grad_scale, found_inf, measured, workspace;
  bool dry_run;

  explicit StepArgs(StableIValue* stack)
      : rule(take_string(stack[0])),
        params(take_tensors(stack[1])),
        grads(take_tensors(stack[2])),
        states(take_tensors(stack[3])),
        steps(take_tensors(stack[4])),
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
};

// Where the numbers are that a step reads, and which kernels it runs.
enum class Kernels { kCpu, kDevice };

// Fills what the job does to tensor i, apart from the tensor itself.
TensorStep tensor_step(const StepArgs& a, int64_t i, int64_t record, const std::vector<Number>& lrs, const Place& place,
                       Kernels kernels) {
  const int64_t rows = int64_t(a.hyper.size()) / record, row = a.groups[i];
  if (row < 0 || row >= rows) fail("groups[", i, "] = ", row, " but there are ", rows, " records");
  const double* h = a.hyper.data() + row * record;
  const Facts step = describe(a.steps[i], "steps", i, place);
  if (step.dims != 0 || step.dtype != Dtype::kFloat32) fail("steps[", i, "] must be a 0-d float32");
  if (kernels == Kernels::kCpu) {
    const float finished = *static_cast<const float*>(step.data);
    if (!(finished >= 0) || !is_finite(finished)) fail("steps[", i, "] is ", finished, ", not a count");
  }
  if (!(h[kLrTensor] < double(lrs.size()))) fail("lr_tensor ", h[kLrTensor], " but there are ", lrs.size(), " lrs");
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

// Checks all that was given, and fills the job with it. False if there is nothing to do.
bool fill_job(const StepArgs& a, const Place& place, Kernels kernels, StepJob& job) {
  const int64_t n = int64_t(a.params.size());
  job.clear();
  job.rule = cpu::rule_index(a.rule.c_str());
  if (job.rule < 0) fail("unknown rule \"", a.rule, "\"");
  if (int64_t(a.grads.size()) != n || int64_t(a.steps.size()) != n || int64_t(a.groups.size()) != n ||
      int64_t(a.axes.size()) != n) {
    fail("grads, steps, groups and axes must have one entry for each of the ", n, " params");
  }
  if (n == 0) return false;
  const int64_t slots = int64_t(a.states.size()) / n, record = kCommon + cpu::rule_hypers(job.rule);
  if (int64_t(a.states.size()) != slots * n || !cpu::rule_takes_slots(job.rule, slots)) {
    fail("rule \"", a.rule, "\" cannot have ", a.states.size(), " states for ", n, " params");
  }
  if (a.hyper.empty() || int64_t(a.hyper.size()) % record != 0) {
    fail("hyper must hold records of ", record, " numbers, it holds ", a.hyper.size());
  }
  if (a.grad_scale.get() && !updates(job.rule)) fail("rule \"", a.rule, "\" has no gradient to unscale by grad_scale");
  job.slots = int(slots);
  job.look = look_facts(look_of(job.rule));

  std::vector<Number> lrs;
  for (size_t i = 0; i < a.lrs.size(); ++i) {
    lrs.push_back(kernels == Kernels::kDevice ? number_of(a.lrs[i], "lrs", place, true, int64_t(i))
                                              : Number{number_in(a.lrs[i], "lrs", int64_t(i))});
  }
  if (a.grad_scale.get() && kernels == Kernels::kDevice) job.grad_scale = number_of(a.grad_scale, "grad_scale", place);
  if (a.grad_scale.get() && kernels == Kernels::kCpu) {
    job.grad_scale.value = number_in(a.grad_scale, "grad_scale");
    if (!(job.grad_scale.value > 0)) fail("grad_scale must be > 0, got ", job.grad_scale.value);
  }
  if (a.found_inf.get()) {
    job.found_inf = kernels == Kernels::kDevice ? number_of(a.found_inf, "found_inf", place)
                                                : Number{number_in(a.found_inf, "found_inf")};
  }

  job.tensors.assign(n, TensorView());
  job.steps.reserve(n);
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Facts param = describe(a.params[i], "params", i, place), grad = describe(a.grads[i], "grads", i, place);
    check_same_shape(grad, param, "grads", i);
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
      const Facts state = describe(a.states[s * n + i], "states", s * n + i, place);
      check_same_shape(state, param, "states", s * n + i);
      if (overlaps(state)) fail("states[", s * n + i, "] overlaps itself in memory");
      if (s > 0 && state.dtype != dtypes.state) fail("states of params[", i, "] have different dtypes");
      dtypes.state = state.dtype;
      add_array(view, state);
    }
    if (i == 0) job.dtypes = dtypes;
    if (!triple_allowed(dtypes)) fail("params[", i, "]: dtypes of parameter, gradient and state do not go together");
    if (dtypes.param != job.dtypes.param || dtypes.grad != job.dtypes.grad || dtypes.state != job.dtypes.state) {
      fail("params[", i, "] and params[0] have different dtypes; one call takes one dtype triple");
    }
    rows += set_groups(view, a.axes[i], rows, i);
    job.steps.push_back(tensor_step(a, i, record, lrs, place, kernels));
    job.steps[i].looks = looks(job.rule, job.steps[i].rule_record);
  }
  for (const int64_t i : a.fresh) {
    if (i < 0 || i >= n) fail("fresh names params[", i, "] but there are ", n);
    job.steps[i].fresh = true;
  }
  if (a.measured.get()) {
    job.measured = static_cast<float*>(buffer(a.measured, "measured", Dtype::kFloat32, rows * kMeasured, place));
  }
  if (a.workspace.get()) {
    job.workspace = buffer(a.workspace, "workspace", Dtype::kFloat32, 0, place);
    job.workspace_bytes = 4 * describe(a.workspace, "workspace", 0, place).numel;
  }
  return true;
}

// Kept, for a long list costs more to allocate than to fill.
StepJob& job_to_fill() {
  static thread_local StepJob job;
  return job;
}

[[maybe_unused]] void step_on_cpu(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 15) fail("fastwrs::step takes 15 arguments, got ", inputs);
  const StepArgs a(stack);
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
  if (inputs != 15) fail("fastwrs::step takes 15 arguments, got ", inputs);
  const StepArgs a(stack);
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
    const StepArgs a(stack);
    const auto constants = to<std::vector<double>>(stack[15]);
    const auto given = to<std::vector<int64_t>>(stack[16]);
    const bool walk = to<bool>(stack[17]);
    const Handle table(to<AtenTensorHandle>(stack[18]));
    const Place place = a.params.empty() ? Place::cpu() : Place::of(a.params[0]);
    StepJob& job = job_to_fill();
    if (fill_job(a, place, Kernels::kDevice, job)) {
      if (int64_t(given.size()) != triton::kSizes || *std::min_element(given.begin(), given.end()) < 1) {
        fail("sizes must be ", triton::kSizes, " numbers above 0");
      }
      const int64_t record = kCommon + cpu::rule_hypers(job.rule), rows = int64_t(a.hyper.size()) / record;
      const int64_t own = int64_t(constants.size()) / rows;
      if (own * rows != int64_t(constants.size())) fail("constants must be as many for each of the ", rows, " records");
      std::vector<double> records;
      for (int64_t row = 0; row < rows; ++row) {
        const double* h = a.hyper.data() + row * record;
        records.insert(records.end(), {h[kLr], h[kMaximize]});
        records.insert(records.end(), h + kEvery, h + kCommon);
        records.insert(records.end(), constants.begin() + row * own, constants.begin() + (row + 1) * own);
      }
      const triton::Sizes sizes{given[0], given[1], given[2], given[3]};
      const Words words = words_in(table, "table");
      needs = triton::fill_table(job, records, kCommon - 1 + own, sizes, walk, words.data, words.count);
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
std::vector<TensorView> group_views(const std::vector<Handle>& tensors, const std::vector<int64_t>& axes, bool written,
                                    Dtype& dtype, int64_t& rows) {
  if (axes.size() != tensors.size()) fail("axes must have one entry for each of the ", tensors.size(), " tensors");
  std::vector<TensorView> views(tensors.size());
  rows = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Facts f = describe(tensors[i], "tensors", int64_t(i));
    if (i == 0) dtype = f.dtype;
    if (f.dtype != dtype) fail("tensors[", i, "] and tensors[0] have different dtypes; one call takes one dtype");
    if (written && overlaps(f)) fail("tensors[", i, "] overlaps itself in memory");
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
  const std::vector<Handle> tensors = take_tensors(stack[0]);
  const auto axes = to<std::vector<int64_t>>(stack[1]);
  const double target = to<double>(stack[2]);
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0;
  const auto views = group_views(tensors, axes, true, dtype, rows);
  if (!(target > 0) || !is_finite(target)) fail("target must be finite and > 0, got ", target);
  if (!views.empty()) cpu::rescale(views, dtype, target, torch_threads());
}

void channel_norms(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 3) fail("fastwrs::channel_norms takes 3 arguments, got ", inputs);
  const std::vector<Handle> tensors = take_tensors(stack[0]);
  const auto axes = to<std::vector<int64_t>>(stack[1]);
  const Handle out(to<AtenTensorHandle>(stack[2]));
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0;
  const auto views = group_views(tensors, axes, false, dtype, rows);
  if (views.empty()) return;
  void* to_write = buffer(out, "out", dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32, rows);
  cpu::norms(views, dtype, to_write, torch_threads());
}

// Of every tensor's rows in a buffer of what was measured, and every figure: minimum, mean, maximum and the root of the
// sum of squares.
void reduce_measured(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 3) fail("fastwrs::reduce_measured takes 3 arguments, got ", inputs);
  const Handle measured(to<AtenTensorHandle>(stack[0]));
  const auto counts = to<std::vector<int64_t>>(stack[1]);
  const Handle out(to<AtenTensorHandle>(stack[2]));
  int64_t rows = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 1) fail("counts[", i, "] must be > 0, got ", counts[i]);
    rows += counts[i];
  }
  const auto* row = static_cast<const float*>(buffer(measured, "measured", Dtype::kFloat32, rows * kMeasured));
  const int64_t tensors = int64_t(counts.size());
  auto* found = static_cast<float*>(buffer(out, "out", Dtype::kFloat32, tensors * cpu::kStatistics * kMeasured));
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
      "measured, "
      "Tensor(f!)? workspace, bool dry_run=False) -> ()");
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

STABLE_TORCH_LIBRARY_IMPL(fastwrs, CompositeExplicitAutograd, m) {
  m.impl("cuda_why_not", &fastwrs::cuda_why_not);
  m.impl("triton_table", &fastwrs::triton_table);
  m.impl("triton_layout", &fastwrs::triton_layout);
  m.impl("rules", &fastwrs::rules);
  m.impl("cpu_isa", &fastwrs::cpu_isa);
}

// Importing the module loads the library; the ops above are all that it has.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
