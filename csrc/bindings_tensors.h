// Tensors as LibTorch's stable C interface hands them over: owned handles, what is known of a tensor, and the checks
// that every op makes. Included by bindings.cpp alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/job.h"
#include "core/memory.h"

namespace fastwrs {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

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
void call(AOTITorchError error, const char* what, int64_t index) {
  if (error != AOTI_TORCH_SUCCESS) fail(what, "[", index, "]: torch refused to describe it");
}

// A tensor that is owned here; cheaper than torch::stable::Tensor, which allocates a second time.
class Handle {
 public:
  explicit Handle(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }

  // Asks the cache for what describe() will read. A handle points to torch's smart pointer to the tensor; were that to
  // change, only the hint would be lost.
  void prefetch() const {
    const char* tensor = *reinterpret_cast<const char* const*>(handle_);
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(tensor + line);
  }

 private:
  AtenTensorHandle handle_;
};

// In a long list every tensor lies in memory of its own, and what is not asked for ahead is waited for.
constexpr size_t kAhead = 8;

class Handles : public std::vector<Handle> {
 public:
  Handles() = default;
  Handles(Handles&&) = default;
  ~Handles() {
    for (size_t i = 0; i < size(); ++i) {
      ahead(i);
      (*this)[i] = Handle();
    }
  }
  // Tensor i is about to be looked at.
  void ahead(size_t i) const {
    if (i + kAhead < size()) (*this)[i + kAhead].prefetch();
  }
};

// Takes what one argument of a boxed call owns, so that nothing leaks where an error is thrown.
Handles take_tensors(StableIValue value) {
  StableListHandle list = to<StableListHandle>(value);
  Handles tensors;
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

bool dtype_of(int32_t code, Dtype& dtype) {
  if (code == aoti_torch_dtype_float32()) return dtype = Dtype::kFloat32, true;
  if (code == aoti_torch_dtype_float64()) return dtype = Dtype::kFloat64, true;
  if (code == aoti_torch_dtype_bfloat16()) return dtype = Dtype::kBFloat16, true;
  if (code == aoti_torch_dtype_float16()) return dtype = Dtype::kFloat16, true;
  return false;
}

// Where all tensors of a call are.
struct Place {
  int32_t type, index;

  static Place cpu() { return {aoti_torch_device_type_cpu(), 0}; }
  static Place of(const Handle& tensor) {
    Place place{};
    call(aoti_torch_get_device_type(tensor.get(), &place.type));
    call(aoti_torch_get_device_index(tensor.get(), &place.index));
    return place;
  }
};

// More elements than an address space has bytes. Only a tensor that repeats itself has as many.
constexpr int64_t kMostElements = int64_t(1) << 48;

// Sizes, strides and memory of a tensor whose elements are `size` bytes long; `what` and `index` name it in errors.
void describe_memory(const Handle& tensor, const char* what, int64_t index, int64_t size, Facts& f) {
  AtenTensorHandle handle = tensor.get();
  int64_t *sizes = nullptr, *strides = nullptr;
  call(aoti_torch_get_dim(handle, &f.dims), what, index);
  call(aoti_torch_get_sizes(handle, &sizes), what, index);
  call(aoti_torch_get_strides(handle, &strides), what, index);
  f.sizes = sizes;
  f.strides = strides;
  f.element = size;
  f.numel = 1;
  for (int64_t d = 0; d < f.dims; ++d) f.numel *= sizes[d];
  if (f.dims > 63) fail(what, "[", index, "] has ", f.dims, " dimensions; at most 63 are supported");
  if (f.numel == 0) return;
  if (f.numel > kMostElements) fail(what, "[", index, "] repeats itself: no memory holds ", f.numel, " elements");
  call(aoti_torch_get_data_ptr(handle, &f.data), what, index);
  if (reinterpret_cast<uintptr_t>(f.data) % size != 0) fail(what, "[", index, "] is not aligned to its elements");
  int64_t last = 0, offset = 0, storage = 0;
  for (int64_t d = 0; d < f.dims; ++d) last += (f.sizes[d] - 1) * f.strides[d];
  call(aoti_torch_get_storage_offset(handle, &offset), what, index);
  call(aoti_torch_get_storage_size(handle, &storage), what, index);
  if ((offset + last + 1) * size > storage) fail(what, "[", index, "] reaches beyond its storage");
  if (!f.data) fail(what, "[", index, "] has no memory");
  f.bytes = (last + 1) * size;
}

Facts describe(const Handle& tensor, const char* what, int64_t index, const Place& place = Place::cpu()) {
  Facts f;
  int32_t layout = 0, dtype = 0;
  const Place found = Place::of(tensor);
  if (found.type != place.type) {
    fail(what, "[", index, "] must be on ",
         place.type == Place::cpu().type ? "the CPU" : "the device of the parameters");
  }
  if (place.type != Place::cpu().type && found.index != place.index) {
    fail(what, "[", index, "] must be on device ", place.index, ", it is on ", found.index);
  }
  call(aoti_torch_get_layout(tensor.get(), &layout), what, index);
  if (layout != aoti_torch_layout_strided()) fail(what, "[", index, "] must be dense (strided), not sparse");
  call(aoti_torch_get_dtype(tensor.get(), &dtype), what, index);
  if (!dtype_of(dtype, f.dtype)) fail(what, "[", index, "] must be float32, float64, bfloat16 or float16");
  describe_memory(tensor, what, index, size_of(f.dtype), f);
  return f;
}

void check_same_shape(const Facts& tensor, const Facts& param, const char* what, int64_t index) {
  if (tensor.dims != param.dims || !std::equal(param.sizes, param.sizes + param.dims, tensor.sizes)) {
    fail(what, "[", index, "] has another shape than its parameter");
  }
}

// The memory that a call writes, and what else it reads there: nothing that is written may be anything else as well.
class Memory {
 public:
  explicit Memory(size_t most) {
    items_.reserve(most);
    key_.reserve(2 * most);
  }

  void reads(const Facts& f, const char* what, int64_t index) { add(f, what, index, false); }
  void writes(const Facts& f, const char* what, int64_t index) { add(f, what, index, true); }

  // Fails where two share memory and one of them is written.
  void check() {
    // What the last call on this thread found to be apart need not be looked at again.
    static thread_local std::vector<uint64_t> apart;
    if (apart == key_) return;
    std::vector<const Item*> order;
    order.reserve(items_.size());
    for (const Item& item : items_) order.push_back(&item);
    std::sort(order.begin(), order.end(), [](const Item* a, const Item* b) {
      return a->facts.begin() != b->facts.begin() ? a->facts.begin() < b->facts.begin() : a < b;
    });
    std::vector<const Item*> open;  // those that the next one may share memory with
    uintptr_t end = 0;
    for (const Item* item : order) {
      if (item->facts.begin() >= end) open.clear();
      for (const Item* other : open) {
        if ((item->written || other->written) && share_memory(other->facts, item->facts)) {
          fail(other->what, "[", other->index, "] and ", item->what, "[", item->index, "] share memory");
        }
      }
      open.push_back(item);
      end = std::max(end, item->facts.begin() + item->facts.bytes);
    }
    apart = key_;
  }

 private:
  struct Item {
    Facts facts;
    const char* what;
    int64_t index;
    bool written;
  };
  void add(const Facts& f, const char* what, int64_t index, bool written) {
    if (f.numel == 0) return;
    items_.push_back({f, what, index, written});
    key_.push_back(f.begin());
    key_.push_back(uint64_t(f.bytes) << 1 | uint64_t(written));
    if (f.numel * f.element == f.bytes) return;
    key_.insert(key_.end(), f.sizes, f.sizes + f.dims);  // which places there are between its ends
    key_.insert(key_.end(), f.strides, f.strides + f.dims);
  }

  std::vector<Item> items_;
  std::vector<uint64_t> key_;
};

// The single number in a tensor.
double number_in(const Facts& f, const char* what, int64_t index) {
  if (f.numel != 1) fail(what, "[", index, "] must hold one number, it holds ", f.numel);
  if (f.dtype == Dtype::kFloat32) return *static_cast<const float*>(f.data);
  if (f.dtype == Dtype::kFloat64) return *static_cast<const double*>(f.data);
  fail(what, "[", index, "] must be float32 or float64");
}

// The same for a tensor that kernels will read, wherever it is.
Number number_of(const Facts& f, const char* what, bool may_be_double, int64_t index) {
  if (f.numel != 1) fail(what, "[", index, "] must hold one number, it holds ", f.numel);
  if (f.dtype != Dtype::kFloat32 && !(may_be_double && f.dtype == Dtype::kFloat64)) {
    fail(what, "[", index, "] must be float32", may_be_double ? " or float64" : "");
  }
  return {0, f.data, f.dtype};
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

// A contiguous buffer of `dtype` with at least the given number of elements.
Facts buffer(const Handle& tensor, const char* what, Dtype dtype, int64_t elements, const Place& place = Place::cpu()) {
  const Facts f = describe(tensor, what, 0, place);
  bool contiguous = false;
  call(aoti_torch_is_contiguous(tensor.get(), &contiguous), what, 0);
  if (f.dtype != dtype || !contiguous) fail(what, " must be contiguous, of the type that norms are computed in");
  if (f.numel < elements) fail(what, " must have at least ", elements, " elements, it has ", f.numel);
  return f;
}

// A contiguous list of int64 in the CPU's memory.
Facts words_in(const Handle& tensor, const char* what) {
  int32_t dtype = 0, layout = 0;
  bool contiguous = false;
  Facts f;
  call(aoti_torch_get_dtype(tensor.get(), &dtype), what, 0);
  call(aoti_torch_get_layout(tensor.get(), &layout), what, 0);
  const bool fits = Place::of(tensor).type == Place::cpu().type && dtype == aoti_torch_dtype_int64() &&
                    layout == aoti_torch_layout_strided();
  if (fits) call(aoti_torch_is_contiguous(tensor.get(), &contiguous), what, 0);
  if (!contiguous) fail(what, " must be int64, contiguous and on the CPU");
  describe_memory(tensor, what, 0, sizeof(int64_t), f);
  return f;
}

}  // namespace
}  // namespace fastwrs
