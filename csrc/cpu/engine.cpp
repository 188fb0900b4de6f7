#include "engine.h"

#include <atomic>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>

#include "../rules/all.h"
#include "worker.h"

namespace fastwrs::cpu {
namespace {

// Fewer elements than this are not worth waking a second thread.
constexpr int64_t kSerialLimit = 32768;
// What an item costs beyond its elements, in elements.
constexpr int64_t kItemCost = 256;
// Parcels of work per thread: enough to even out a thread that is held up, few enough to cost nothing.
constexpr int64_t kParcelsPerThread = 8;
// What is read a second time should still be in the cache: so many bytes of tensors go through all phases before the
// next ones begin. Of a larger tensor the end is read again first.
constexpr int64_t kWave = 16 << 20;

// Scratch that is kept from step to step, so that a step allocates nothing once it is warm.
template <class P>
class WorkerPool {
 public:
  std::vector<std::unique_ptr<Worker<P>>> take(int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::unique_ptr<Worker<P>>> taken(count);
    for (auto& worker : taken) {
      if (free_.empty()) {
        worker = std::make_unique<Worker<P>>();
      } else {
        worker = std::move(free_.back());
        free_.pop_back();
      }
    }
    return taken;
  }
  void give_back(std::vector<std::unique_ptr<Worker<P>>>& workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& worker : workers) free_.push_back(std::move(worker));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker<P>>> free_;
};

// Tensors that go through all phases together: [begin, end).
struct Wave {
  size_t begin, end;
};

// Runs a phase: every item of every tensor of a wave once, on all threads, in any order.
template <class P>
class Phase {
  using C = compute_t<P>;

 public:
  using Body = void (Worker<P>::*)(const Call<P>&, const Work<C>&, int64_t begin, int64_t end);

  // backwards: begins with what the phase before has left in the cache.
  Phase(const Call<P>& call, const std::vector<Work<C>>& works, Body body, bool backwards = false)
      : call_(call), works_(works), body_(body), backwards_(backwards) {}

  void add(int64_t items, int64_t elements) {
    map_.add(items);
    elements_.push_back(elements);
  }

  bool any() const { return map_.items() > 0; }

  void run(std::vector<std::unique_ptr<Worker<P>>>& workers, const Threads& threads, const Wave& wave) {
    if (!any()) return;  // nor has it been told of the tensors
    const int64_t begin = map_.first[wave.begin], end = map_.first[wave.end];
    if (begin == end) return;
    workers_ = &workers;
    int64_t cost = (end - begin) * kItemCost;
    for (size_t t = wave.begin; t < wave.end; ++t) cost += map_.first[t + 1] > map_.first[t] ? elements_[t] : 0;
    const int64_t count = cost < kSerialLimit ? 1 : int64_t(workers.size());
    if (count == 1) return run_items(*workers[0], begin, end);
    cut_parcels(wave, cost / (count * kParcelsPerThread) + 1);
    next_ = 0;
    threads.run(
        count,
        [](int64_t i, void* self) {
          Phase& phase = *static_cast<Phase*>(self);
          const int64_t last = int64_t(phase.parcels_.size()) - 1;
          for (int64_t turn; (turn = phase.next_.fetch_add(1)) < last;) {
            const int64_t parcel = phase.backwards_ ? last - 1 - turn : turn;
            phase.run_items(*(*phase.workers_)[i], phase.parcels_[parcel], phase.parcels_[parcel + 1]);
          }
        },
        this);
  }

 private:
  // Parcels of about the cost `share`: bounds in items.
  void cut_parcels(const Wave& wave, int64_t share) {
    parcels_.assign(1, map_.first[wave.begin]);
    int64_t cost = 0;
    for (size_t t = wave.begin; t < wave.end; ++t) {
      const int64_t items = map_.first[t + 1] - map_.first[t];
      if (items == 0) continue;
      const int64_t item_cost = elements_[t] / items + kItemCost;
      for (int64_t item = 0; item < items;) {
        const int64_t taken = std::min(items - item, std::max<int64_t>(1, (share - cost + item_cost - 1) / item_cost));
        item += taken;
        cost += taken * item_cost;
        if (cost >= share) {
          parcels_.push_back(map_.first[t] + item);
          cost = 0;
        }
      }
    }
    if (parcels_.back() != map_.first[wave.end]) parcels_.push_back(map_.first[wave.end]);
  }

  void run_items(Worker<P>& worker, int64_t begin, int64_t end) {
    int64_t tensor = map_.tensor_of(begin);
    for (int64_t item = begin; item < end; item = std::min(end, map_.first[tensor + 1])) {
      while (map_.first[tensor + 1] <= item) ++tensor;
      const int64_t first = map_.first[tensor];
      (worker.*body_)(call_, works_[tensor], item - first, std::min(end, map_.first[tensor + 1]) - first);
    }
  }

  const Call<P>& call_;
  const std::vector<Work<C>>& works_;
  Body body_;
  bool backwards_;
  BlockMap map_;
  std::vector<int64_t> elements_, parcels_;
  std::atomic<int64_t> next_{0};
  std::vector<std::unique_ptr<Worker<P>>>* workers_ = nullptr;
};

// Consecutive tensors that fit the cache together; all of them at once where nothing is read twice.
template <class P>
std::vector<Wave> cut_waves(const Call<P>& call, const std::vector<Work<compute_t<P>>>& works, bool again) {
  if (!again) return {{0, works.size()}};
  std::vector<Wave> waves{{0, 0}};
  int64_t bytes = 0;
  for (const auto& w : works) {
    int64_t size = 0;
    for (int k = 0; k < call.arrays(*w.view); ++k) size += w.plan.geometry.numel() * call.element_size(k);
    if (bytes > 0 && bytes + size > kWave) {
      waves.push_back({waves.back().end, waves.back().end});
      bytes = 0;
    }
    ++waves.back().end;
    bytes += size;
  }
  return waves;
}

// A tensor without elements has groups all the same, of norm 0.
template <class P>
void conclude_empty(const Call<P>& call, const TensorView& view) {
  if (view.norm_row < 0) return;
  const int64_t groups = group_count(view);
  if (call.norms) std::fill_n(call.norms + view.norm_row, groups, compute_t<P>(0));
  for (int64_t i = 0; call.measured && i < groups; ++i) {
    float* row = call.measured + kMeasured * (view.norm_row + i);
    for (int k = 0; k < kMeasured; ++k) row[k] = measured_of_nothing(k);
  }
}

// `looks`: for a rule that looks first, what its first pass works on, one for each of `works`.
template <class P>
void run_call(Call<P>& call, std::vector<Work<compute_t<P>>>& looks, std::vector<Work<compute_t<P>>>& works,
              void* workspace, int64_t workspace_bytes, const Threads& threads) {
  using C = compute_t<P>;
  static WorkerPool<P> pool;
  static thread_local std::vector<C> own_workspace;

  call.store = Loops<P>::store(leaves());
  call.sum = Loops<P>::sum(leaves());
  Phase<P> look(call, looks, &Worker<P>::look_at), rows(call, looks, &Worker<P>::finish_rows),
      settle(call, looks, &Worker<P>::settle);
  Phase<P> first(call, works, &Worker<P>::first_phase, !looks.empty()), finish(call, works, &Worker<P>::finish),
      scale(call, works, &Worker<P>::scale, looks.empty());
  int64_t needed = 0;
  for (size_t i = 0; i < looks.size(); ++i) {
    TensorPlan& p = looks[i].plan;
    p.cut();
    const bool has_rows = p.sums() && p.items > 0, in_parts = p.path == TensorPlan::kTwoPhases;
    const int64_t groups = p.geometry.groups();
    looks[i].look = works[i].look = has_rows ? needed : -1;
    if (has_rows) needed += call.look.head + call.look.sums * groups;
    p.workspace = needed;
    needed += p.workspace_size();
    look.add(p.items, p.geometry.numel());
    rows.add(has_rows && in_parts ? p.geometry.units * p.strips : 0, p.sum_size());
    settle.add(has_rows ? 1 : 0, call.look.sums * groups);
  }
  for (Work<C>& w : works) {
    TensorPlan& p = w.plan;
    p.cut();
    if (!call.update && !p.sums()) p.items = 0;  // nothing is done to it
    p.workspace = needed;
    needed += p.workspace_size();
    const bool two_phases = p.path == TensorPlan::kTwoPhases;
    const int64_t elements = p.geometry.numel();
    first.add(p.items, elements);
    finish.add(two_phases ? p.geometry.units * p.strips : 0, two_phases ? p.sum_size() : 0);
    scale.add(two_phases && p.scales() && call.writes ? p.items : 0, elements);
  }
  // Everything that can fail for want of memory comes before the first write.
  const bool aligned = reinterpret_cast<uintptr_t>(workspace) % alignof(C) == 0;
  if (aligned && int64_t(needed * sizeof(C)) <= workspace_bytes) {
    call.workspace = static_cast<C*>(workspace);
  } else {
    if (int64_t(own_workspace.size()) < needed) own_workspace.resize(needed);
    call.workspace = own_workspace.data();
  }
  auto workers = pool.take(threads.count);
  for (auto& worker : workers) worker->reserve(call, looks, works);

  for (const Wave& wave : cut_waves(call, works, look.any() || scale.any())) {
    for (Phase<P>* phase : {&look, &rows, &settle, &first, &finish, &scale}) phase->run(workers, threads, wave);
  }
  for (const Work<C>& w : works) {
    if (w.plan.geometry.numel() == 0) conclude_empty(call, *w.view);
  }
  pool.give_back(workers);
}

// The rule's scalars of a tensor, as doubles. Tensors of a group at the same step share them.
struct ScalarCache {
  const double* record = nullptr;
  double lr = 0, t = 0;
  bool first = false;
  double values[kMaxScalars] = {};

  int fill(int rule, const double* rule_record, double lr_, double t_, bool first_) {
    int index = 0, count = 0;
    const bool known = record == rule_record && lr == lr_ && t == t_ && first == first_;
#define FASTWRS_RULE(Rule)                                                                  \
  if (rule == index++) {                                                                    \
    using Scalars = Rule::Scalars<double>;                                                  \
    static_assert(sizeof(Scalars) <= sizeof(values), "raise kMaxScalars");                  \
    count = int(sizeof(Scalars) / sizeof(double));                                          \
    if (!known) {                                                                           \
      const Scalars scalars = Rule::prepare(Rule::constants(rule_record), lr_, t_, first_); \
      std::memcpy(values, &scalars, sizeof scalars);                                        \
    }                                                                                       \
  }
    FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
    record = rule_record;
    lr = lr_;
    t = t_;
    first = first_;
    return count;
  }
};

// What a rule's look has to know, in fields of the tensor's work; for a rule without one nothing.
template <class Rule, class C>
void fill_look_of([[maybe_unused]] const double* h, [[maybe_unused]] Work<C>& w) {
  if constexpr (Rule::kLook != Look::kNone) w.look_eps = C(h[Rule::kEps]);
  if constexpr (Rule::kLook == Look::kGate) {
    w.look_other = C(h[Rule::kDelta]);
    w.unscales_late = h[Rule::kNesterov] != 0;
  } else if constexpr (Rule::kLook == Look::kShift) {
    w.look_other = C(h[Rule::kLam]);
    w.unscales_late = true;
  }
}
template <class C>
void fill_look(int rule, const double* h, Work<C>& w) {
  int index = 0;
#define FASTWRS_RULE(Rule) \
  if (rule == index++) fill_look_of<Rule>(h, w);
  FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
}

// What the first pass works on: the rows of dimension 0. Nothing, if it would have no sums to make and no states to
// change.
template <class C>
Work<C> look_of_tensor(const StepJob& job, size_t i, const Work<C>& work, TensorView& view) {
  view = view_of_rows(job.tensors[i], job.look.changes_states ? job.tensors[i].arrays : 1);
  const bool sums = job.steps[i].looks && view.reduced != 0;
  Work<C> look = work;
  look.view = &view;
  look.plan = TensorPlan();
  std::fill_n(look.plan.wants, job.look.sums, sums);
  if (sums || job.look.changes_states) look.plan.geometry = geometry_of(view, sums);
  return look;
}

template <class P>
void step_typed(const StepJob& job, const Threads& threads) {
  using C = compute_t<P>;
  Call<P> call;
  call.look_at = leaves().look_at(job.rule, job.dtypes.param, job.dtypes.grad, job.dtypes.state);
  call.look = job.look;
  call.rows = leaves().update(job.rule, job.slots, job.dtypes.param, job.dtypes.grad, job.dtypes.state);
  if (updates(job.rule)) call.update = call.rows;
  call.dtypes = job.dtypes;
  call.grad_scale = job.grad_scale.value;
  call.measured = job.measured;
  static thread_local std::vector<Work<C>> works;  // kept, for a long list costs more to allocate than to fill
  works.assign(job.tensors.size(), Work<C>());
  static thread_local std::vector<Work<C>> looks;
  static thread_local std::vector<TensorView> look_views;
  looks.clear();
  look_views.resize(call.look_at ? job.tensors.size() : 0);
  std::vector<float> finished(job.tensors.size());
  ScalarCache scalars;
  for (size_t i = 0; i < works.size(); ++i) {
    const TensorStep& s = job.steps[i];
    Work<C>& w = works[i];
    const double t = double(*s.step) + 1;
    finished[i] = float(t);
    w.view = &job.tensors[i];
    w.maximize = s.maximize;
    const int count = scalars.fill(job.rule, s.rule_record, s.lr.value, t, t == 1 || s.fresh);
    leaves().cast_scalars(scalars.values, w.scalars, count, job.dtypes.param);
    if (w.view->reduced != 0) {
      w.plan.projection = Projection<double>::at(t, s.lr.value, s.every, s.start, s.stop, s.target, s.rate, s.power);
    }
    const bool measure = job.measured && w.view->norm_row >= 0;
    w.plan.wants[kBefore] = measure || w.plan.projection.shrink;
    w.plan.wants[kUpdated] = measure || w.plan.projection.rescale;
    w.plan.wants[kGrad] = w.plan.wants[kUpdate] = measure && call.update;
    w.plan.geometry = geometry_of(*w.view, w.plan.sums());
    if (!call.look_at) continue;
    fill_look(job.rule, s.rule_record, w);
    looks.push_back(look_of_tensor(job, i, w, look_views[i]));
  }
  run_call(call, looks, works, job.workspace, job.workspace_bytes, threads);
  for (size_t i = 0; i < works.size(); ++i) *job.steps[i].step = finished[i];
}

template <class P>
void project_typed(const std::vector<TensorView>& tensors, const double* target, void* norms, const Threads& threads) {
  using C = compute_t<P>;
  Call<P> call;
  call.dtypes.param = DtypeOf<P>::value;
  call.writes = target != nullptr;
  call.norms = static_cast<C*>(norms);
  const Dtype dtype = DtypeOf<P>::value;
  if (target) call.rows = leaves().update(rule_index(Project::kName), 0, dtype, dtype, DtypeOf<C>::value);
  std::vector<Work<C>> works(tensors.size());
  for (size_t i = 0; i < works.size(); ++i) {
    works[i].view = &tensors[i];
    works[i].plan.projection.rescale = target != nullptr;
    if (target) works[i].plan.projection.target = *target;
    works[i].plan.wants[kUpdated] = true;
    works[i].plan.geometry = geometry_of(tensors[i], true);
  }
  std::vector<Work<C>> no_looks;
  run_call(call, no_looks, works, nullptr, 0, threads);
}

// Calls body with a value of the C++ type that `dtype` names.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
#define FASTWRS_TYPE(P) \
  if (dtype == DtypeOf<P>::value) return body(P());
  FASTWRS_PARAM_DTYPES(FASTWRS_TYPE)
#undef FASTWRS_TYPE
}

struct RuleFacts {
  const char* name;
  int min_slots, max_slots, hypers;
  const char* const* hyper;
};
#define FASTWRS_RULE(Rule) \
  {Rule::kName, Rule::kMinSlots, Rule::kMaxSlots, int(std::size(Rule::kHypers)), std::data(Rule::kHypers)},
constexpr RuleFacts kRules[] = {FASTWRS_RULES(FASTWRS_RULE)};
#undef FASTWRS_RULE

}  // namespace

int rule_index(const std::string& name) {
  int index = 0;
  for (const RuleFacts& rule : kRules) {
    if (name == rule.name) return index;
    ++index;
  }
  return -1;
}

bool rule_takes_slots(int rule, int64_t slots) {
  return kRules[rule].min_slots <= slots && slots <= kRules[rule].max_slots;
}

int64_t rule_hypers(int rule) { return kRules[rule].hypers; }

const char* rule_hyper(int rule, int64_t number) { return kRules[rule].hyper[number]; }

void step(const StepJob& job, const Threads& threads) {
  with_type(job.dtypes.param, [&](auto type) { step_typed<decltype(type)>(job, threads); });
}

void rescale(const std::vector<TensorView>& tensors, Dtype dtype, double target, const Threads& threads) {
  with_type(dtype, [&](auto type) { project_typed<decltype(type)>(tensors, &target, nullptr, threads); });
}

void norms(const std::vector<TensorView>& tensors, Dtype dtype, void* out, const Threads& threads) {
  with_type(dtype, [&](auto type) { project_typed<decltype(type)>(tensors, nullptr, out, threads); });
}

}  // namespace fastwrs::cpu
