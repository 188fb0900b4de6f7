// Schemas and registration: the only C++ file that knows torch (LibTorch's stable ABI) and Python (the limited API).
// An op checks all that it was given before it hands plain pointers to the backend, so that an error leaves everything
// as it was.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "cpu/engine.h"
#include "cpu/leaves.h"
#include "norms/measured.h"
#include "rules/all.h"

namespace fastwrs {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// The common part of a hyperparameter record; fastwrs/spec.py names the same in the same order.
enum Common { kLr, kLrTensor, kMaximize, kEvery, kStart, kStop, kTarget, kRate, kPower, kCommon };
constexpr const char* kCommonNames[] = {"lr",   "lr_tensor", "maximize", "every", "start",
                                        "stop", "target",    "rate",     "power"};
static_assert(sizeof(kCommonNames) / sizeof(kCommonNames[0]) == kCommon, "names and numbers of the common record");

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fastwrs: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void call(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) fail("torch refused to describe a tensor");
}

// A tensor that is owned here; cheaper than torch::stable::Tensor, which allocates a second time.
class Handle {
 public:
  explicit Handle(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_;
};

// Takes what one argument of a boxed call owns, so that nothing leaks where an error is thrown.
std::vector<Handle> take_tensors(StableIValue value) {
  StableListHandle list = to<StableListHandle>(value);
  std::vector<Handle> tensors;
  size_t size = 0;
  AOTITorchError error = torch_list_size(list, &size);
  tensors.reserve(size);
  for (size_t i = 0; error == AOTI_TORCH_SUCCESS && i < size; ++i) {
    StableIValue item;
    error = torch_list_get_item(list, i, &item);
    if (error == AOTI_TORCH_SUCCESS) tensors.emplace_back(to<AtenTensorHandle>(item));
  }
  torch_delete_list(list);
  call(error);
  return tensors;
}

Handle take_optional_tensor(StableIValue value) {
  auto* inner = to<StableIValue*>(value);
  if (inner == nullptr) return Handle();
  Handle tensor(to<AtenTensorHandle>(*inner));
  delete inner;
  return tensor;
}

std::string take_string(StableIValue value) {
  StringHandle handle = to<StringHandle>(value);
  size_t length = 0;
  const char* data = nullptr;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &data);
  std::string text(data, length);
  torch_delete_string(handle);
  return text;
}

// What a tensor is, as the backend sees it.
struct Facts {
  void* data = nullptr;
  int64_t numel = 0, dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

bool dtype_of(int32_t code, Dtype& dtype) {
  if (code == aoti_torch_dtype_float32()) return dtype = Dtype::kFloat32, true;
  if (code == aoti_torch_dtype_float64()) return dtype = Dtype::kFloat64, true;
  if (code == aoti_torch_dtype_bfloat16()) return dtype = Dtype::kBFloat16, true;
  if (code == aoti_torch_dtype_float16()) return dtype = Dtype::kFloat16, true;
  return false;
}

// `what` and `index` name the tensor in errors.
Facts describe(const Handle& tensor, const char* what, int64_t index) {
  AtenTensorHandle handle = tensor.get();
  Facts f;
  int32_t device = 0, layout = 0, dtype = 0;
  call(aoti_torch_get_device_type(handle, &device));
  if (device != aoti_torch_device_type_cpu()) fail(what, "[", index, "] must be on the CPU");
  call(aoti_torch_get_layout(handle, &layout));
  if (layout != aoti_torch_layout_strided()) fail(what, "[", index, "] must be dense (strided), not sparse");
  call(aoti_torch_get_dtype(handle, &dtype));
  if (!dtype_of(dtype, f.dtype)) fail(what, "[", index, "] must be float32, float64, bfloat16 or float16");
  int64_t *sizes = nullptr, *strides = nullptr;
  call(aoti_torch_get_dim(handle, &f.dims));
  call(aoti_torch_get_sizes(handle, &sizes));
  call(aoti_torch_get_strides(handle, &strides));
  f.sizes = sizes;
  f.strides = strides;
  f.numel = 1;
  for (int64_t d = 0; d < f.dims; ++d) f.numel *= sizes[d];
  if (f.dims > 63) fail(what, "[", index, "] has ", f.dims, " dimensions; at most 63 are supported");
  if (f.numel == 0) return f;
  call(aoti_torch_get_data_ptr(handle, &f.data));
  int64_t last = 0, offset = 0, storage = 0;
  for (int64_t d = 0; d < f.dims; ++d) last += (f.sizes[d] - 1) * f.strides[d];
  call(aoti_torch_get_storage_offset(handle, &offset));
  call(aoti_torch_get_storage_size(handle, &storage));
  if ((offset + last + 1) * size_of(f.dtype) > storage) fail(what, "[", index, "] reaches beyond its storage");
  return f;
}

// Whether two indices name one element.
bool overlaps(const Facts& f) {
  if (f.numel <= 1) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = f.dims - 1; d >= 0; --d) {
    if (f.sizes[d] == 1) continue;
    if (f.strides[d] == 0) return true;
    dims.emplace_back(f.strides[d], f.sizes[d]);
  }
  if (!std::is_sorted(dims.begin(), dims.end())) std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  bool nested = true;  // each dimension steps over all that the smaller strides reach: no overlap
  for (const auto& [stride, size] : dims) {
    nested = nested && stride >= reach;
    reach += (size - 1) * stride;
  }
  if (nested) return false;
  // Interleaved strides are rare: look at every element.
  std::vector<int64_t> places{0};
  places.reserve(f.numel);
  for (const auto& [stride, size] : dims) {
    const size_t inner = places.size();
    for (int64_t i = 1; i < size; ++i) {
      for (size_t k = 0; k < inner; ++k) places.push_back(places[k] + i * stride);
    }
  }
  std::sort(places.begin(), places.end());
  return std::adjacent_find(places.begin(), places.end()) != places.end();
}

void check_same_shape(const Facts& tensor, const Facts& param, const char* what, int64_t index) {
  if (tensor.dims != param.dims || !std::equal(param.sizes, param.sizes + param.dims, tensor.sizes)) {
    fail(what, "[", index, "] has another shape than its parameter");
  }
}

// The single number in a tensor.
double number_in(const Handle& tensor, const char* what, int64_t index = 0) {
  const Facts f = describe(tensor, what, index);
  if (f.numel != 1) fail(what, "[", index, "] must hold one number, it holds ", f.numel);
  if (f.dtype == Dtype::kFloat32) return *static_cast<const float*>(f.data);
  if (f.dtype == Dtype::kFloat64) return *static_cast<const double*>(f.data);
  fail(what, "[", index, "] must be float32 or float64");
}

// The tensor's view for norm groups over the dimensions in `axes`; returns how many groups there are.
int64_t set_groups(TensorView& view, int64_t axes, int64_t first_row, int64_t index) {
  view.reduced = axes;
  if (axes == 0) return 0;
  if (axes < -1 || (axes > 0 && (axes >> view.dims) != 0)) {
    fail("axes[", index, "] = ", axes, " names dimensions that params[", index, "] does not have (", view.dims, ")");
  }
  view.norm_row = first_row;
  const int64_t groups = group_count(view);
  if (groups + first_row > kMaxGroups) fail("tensor ", index, " of the list has too many norm groups");
  return groups;
}

void add_array(TensorView& view, const Facts& f) {
  view.array[view.arrays].data = f.data;
  view.array[view.arrays++].strides = f.strides;
}

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

// A contiguous buffer of `dtype` with at least the given number of elements.
void* buffer(const Handle& tensor, const char* what, Dtype dtype, int64_t elements) {
  const Facts f = describe(tensor, what, 0);
  bool contiguous = false;
  call(aoti_torch_is_contiguous(tensor.get(), &contiguous));
  if (f.dtype != dtype || !contiguous) fail(what, " must be contiguous, of the type that norms are computed in");
  if (f.numel < elements) fail(what, " must have at least ", elements, " elements, it has ", f.numel);
  return f.data;
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

// Fills what the job does to tensor i, apart from the tensor itself.
TensorStep tensor_step(const StepArgs& a, int64_t i, int64_t record, const std::vector<double>& lrs) {
  const int64_t rows = int64_t(a.hyper.size()) / record, row = a.groups[i];
  if (row < 0 || row >= rows) fail("groups[", i, "] = ", row, " but there are ", rows, " records");
  const double* h = a.hyper.data() + row * record;
  const Facts step = describe(a.steps[i], "steps", i);
  if (step.dims != 0 || step.dtype != Dtype::kFloat32) fail("steps[", i, "] must be a 0-d float32");
  const float finished = *static_cast<const float*>(step.data);
  if (!(finished >= 0) || !is_finite(finished)) fail("steps[", i, "] is ", finished, ", not a count");
  if (!(h[kLrTensor] < double(lrs.size()))) fail("lr_tensor ", h[kLrTensor], " but there are ", lrs.size(), " lrs");
  const double lr = h[kLrTensor] < 0 ? h[kLr] : lrs[size_t(h[kLrTensor])];
  return {static_cast<float*>(step.data),
          row,
          h + kCommon,
          {lr},
          h[kMaximize] != 0,
          false,
          h[kEvery],
          h[kStart],
          h[kStop],
          h[kTarget],
          h[kRate],
          h[kPower]};
}

void step(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  if (inputs != 15) fail("fastwrs::step takes 15 arguments, got ", inputs);
  const StepArgs a(stack);
  const int64_t n = int64_t(a.params.size());
  static thread_local StepJob job;  // kept, for a long list costs more to allocate than to fill
  job.clear();
  job.rule = cpu::rule_index(a.rule.c_str());
  if (job.rule < 0) fail("unknown rule \"", a.rule, "\"");
  if (int64_t(a.grads.size()) != n || int64_t(a.steps.size()) != n || int64_t(a.groups.size()) != n ||
      int64_t(a.axes.size()) != n) {
    fail("grads, steps, groups and axes must have one entry for each of the ", n, " params");
  }
  if (n == 0) return;
  const int64_t slots = int64_t(a.states.size()) / n, record = kCommon + cpu::rule_hypers(job.rule);
  if (int64_t(a.states.size()) != slots * n || !cpu::rule_takes_slots(job.rule, slots)) {
    fail("rule \"", a.rule, "\" cannot have ", a.states.size(), " states for ", n, " params");
  }
  if (a.hyper.empty() || int64_t(a.hyper.size()) % record != 0) {
    fail("hyper must hold records of ", record, " numbers, it holds ", a.hyper.size());
  }
  job.slots = int(slots);

  std::vector<double> lrs;
  for (size_t i = 0; i < a.lrs.size(); ++i) lrs.push_back(number_in(a.lrs[i], "lrs", int64_t(i)));
  if (a.grad_scale.get()) {
    job.grad_scale.value = number_in(a.grad_scale, "grad_scale");
    if (!(job.grad_scale.value > 0)) fail("grad_scale must be > 0, got ", job.grad_scale.value);
  }

  job.tensors.assign(n, TensorView());
  job.steps.reserve(n);
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Facts param = describe(a.params[i], "params", i), grad = describe(a.grads[i], "grads", i);
    check_same_shape(grad, param, "grads", i);
    if (overlaps(param)) fail("params[", i, "] overlaps itself in memory");
    if (a.grad_scale.get() && overlaps(grad)) fail("grads[", i, "] overlaps itself in memory and is to be unscaled");
    TensorView& view = job.tensors[i];
    view.dims = int(param.dims);
    view.sizes = param.sizes;
    add_array(view, param);
    add_array(view, grad);
    Dtypes dtypes{param.dtype, grad.dtype, param.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32};
    for (int64_t s = 0; s < slots; ++s) {
      const Facts state = describe(a.states[s * n + i], "states", s * n + i);
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
    job.steps.push_back(tensor_step(a, i, record, lrs));
  }
  for (const int64_t i : a.fresh) {
    if (i < 0 || i >= n) fail("fresh names params[", i, "] but there are ", n);
    job.steps[i].fresh = true;
  }
  if (a.measured.get()) {
    job.measured = static_cast<float*>(buffer(a.measured, "measured", Dtype::kFloat32, rows * kMeasured));
  }
  if (a.workspace.get()) {
    job.workspace = buffer(a.workspace, "workspace", Dtype::kFloat32, 0);
    job.workspace_bytes = 4 * describe(a.workspace, "workspace", 0).numel;
  }
  const bool skipped = a.found_inf.get() && number_in(a.found_inf, "found_inf") != 0;
  if (a.dry_run || skipped) return;
  cpu::step(job, torch_threads());
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
  m.def("rescale_(Tensor(a!)[] tensors, int[] axes, float target) -> ()");
  m.def("channel_norms(Tensor[] tensors, int[] axes, Tensor(a!) out) -> ()");
  m.def("rules() -> str");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastwrs, CPU, m) {
  m.impl("step", &fastwrs::step);
  m.impl("rescale_", &fastwrs::rescale);
  m.impl("channel_norms", &fastwrs::channel_norms);
}

STABLE_TORCH_LIBRARY_IMPL(fastwrs, CompositeExplicitAutograd, m) {
  m.impl("rules", &fastwrs::rules);
  m.impl("cpu_isa", &fastwrs::cpu_isa);
}

// Importing the module loads the library; the ops above are all that it has.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
