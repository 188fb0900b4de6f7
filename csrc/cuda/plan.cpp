#include "plan.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <type_traits>

#include "../norms/geometry.h"
#include "../norms/measured.h"
#include "../rules/all.h"
#include "launch.h"
#include "layout.h"

namespace fastwrs::cuda {
namespace {

// Bytes of weights, in the compute type, that a tile of short units or of elements has. The most that a tile may hold
// before a tensor goes to a launch of its own kind with larger blocks, so that one long row does not cost all others
// their occupancy.
constexpr int64_t kTileBytes = 16384, kNarrowBytes = 40 * 1024;
// A unit of at least so many elements has a tile for itself.
constexpr int64_t kOwnTile = 1024;
// Axis 0 of a matrix: columns of a strip that is held on chip, the wider the better; columns of a tile that is not.
constexpr int64_t kStrips[] = {32, 16}, kPartialColumns = 64;
// Bytes of weights that are updated before their second pass follows, which then finds them in the L2 cache.
constexpr int64_t kChunkBytes = int64_t(16) << 20;
// One ticket for a launch, and one for each of its tensors.
constexpr int64_t kTicketBytes = 2048, kMostBlocks = (int64_t(1) << 31) - 1;
static_assert((1 + Params<2>::kEntries) * 4 <= kTicketBytes, "a ticket for every tensor");

// How one tensor is cut, and what of its record matters for that.
struct TensorCut {
  Geometry geometry;
  TileKind kind = TileKind::kElements;
  int64_t tile = 1, tiles = 0, shared = 0;
  bool wide = false;
  int64_t row_tiles = 1;
};

struct Need {
  bool before, updated, all;
  uint32_t lists() const { return all ? kSums : before + updated; }
  uint32_t kinds() const { return all ? kSums : updated ? 2 : 1; }  // highest sum, counted from 1
};

template <class C>
uint32_t tile_shared(int64_t groups, int64_t elements, const Need& need, bool held, uint32_t threads) {
  // One sum of one group is taken in registers, others from lists of values; what is held is the list of new weights.
  const bool at_once = groups == 1 && !need.all;
  const uint32_t lists = at_once ? (held ? 1 : 0) : need.lists() + (held && !need.updated && !need.all);
  return sums_bytes<C>(uint32_t(groups), need.kinds(), threads) + lists * values_bytes<C>(uint32_t(elements));
}

template <class C>
class Cutter {
 public:
  Cutter(const StepJob& job, const Limits& limits) : job_(job), limits_(limits) {
    vector_ = kWordBytes / std::min({size_of(job.dtypes.param), size_of(job.dtypes.grad), size_of(job.dtypes.state)});
    bool both = false;
    for (const TensorStep& step : job.steps) both = both || (step.rate != 0 && step.every > 0);
    partial_elements_ = kTileBytes / int64_t(sizeof(C)) / (job.measured ? kSums : both ? 2 : 1);
  }
  int64_t partial_elements() const { return partial_elements_; }

  TensorCut cut(int64_t i) const {
    const TensorView& view = job_.tensors[i];
    const TensorStep& step = job_.steps[i];
    Need need{};
    need.all = job_.measured && view.norm_row >= 0 && view.reduced != 0;
    need.before = need.all || step.rate != 0;
    need.updated = need.all || step.every > 0;
    const bool with_norms = view.reduced != 0 && (need.before || need.updated);
    TensorCut cut;
    cut.geometry = geometry_of(view, with_norms);
    Geometry& g = cut.geometry;
    if (g.rows == 1) {  // every element is a group: columns or units, and only units have 64 bits
      g.units *= g.cols;
      g.cols = 1;
    }
    const int64_t numel = g.numel(), unit = g.unit_size();
    cut.tile = kTileBytes / int64_t(sizeof(C));
    if (numel == 0) return cut;
    if (!with_norms) {
      cut.tiles = (numel + cut.tile - 1) / cut.tile;
      return cut;
    }
    if (g.cols > int64_t(kNone))
      throw std::runtime_error("fastwrs: a tensor has more than 2^32 norm groups side by side");
    const int64_t held_bytes = std::min(limits_.shared_per_block, limits_.held_bytes);
    if (unit * int64_t(sizeof(C)) <= held_bytes) {
      // Sums of many small groups take more than their elements: fewer then, rather than a block for each group.
      int64_t units = units_per_tile(g, need.lists());
      while (units > 1 && !fits(cut, units * g.cols, units * unit, need, true, held_bytes)) units /= 2;
      if (fits(cut, units * g.cols, units * unit, need, true, held_bytes)) {
        cut.kind = TileKind::kUnits;
        cut.tile = units;
        cut.tiles = (g.units + units - 1) / units;
        return cut;
      }
    }
    for (const int64_t strip : kStrips) {
      if (g.cols < strip || g.rows > (int64_t(1) << 20)) continue;
      if (!fits(cut, strip, g.rows * strip, need, true, limits_.shared_per_block)) continue;
      cut.kind = TileKind::kStrip;
      cut.tile = strip;
      cut.tiles = g.units * ((g.cols + strip - 1) / strip);
      return cut;
    }
    cut.kind = TileKind::kPartial;
    cut.tile = std::min(g.cols, kPartialColumns);
    const int64_t rows = partial_elements_ / cut.tile;
    cut.row_tiles = (g.rows + rows - 1) / rows;
    cut.tiles = g.units * cut.row_tiles * ((g.cols + cut.tile - 1) / cut.tile);
    if (!fits(cut, cut.tile, rows * cut.tile, need, false, limits_.shared_per_block)) {
      throw std::runtime_error("fastwrs: this GPU has too little shared memory");
    }
    return cut;
  }

  // How the first pass of a rule that looks is cut: by the rows of dimension 0. One that changes the states does so for
  // tensors without rows too; one that does not leaves them out.
  TensorCut cut_look(int64_t i) const {
    const LookFacts& look = job_.look;
    const TensorView view = view_of_rows(job_.tensors[i], look.changes_states ? job_.tensors[i].arrays : 1);
    const bool rows = job_.steps[i].looks && view.reduced != 0;
    TensorCut cut;
    if (!rows && !look.changes_states) return cut;
    cut.geometry = geometry_of(view, rows);
    Geometry& g = cut.geometry;
    if (rows && g.rows == 1) {  // rows of one element: units, of which a tile takes no more than it has room for
      g.units *= g.cols;
      g.cols = 1;
    }
    const int64_t numel = g.numel(), unit = g.unit_size(), most = kTileBytes / int64_t(sizeof(C));
    cut.tile = most;
    if (numel == 0) return cut;
    cut.tiles = (numel + most - 1) / most;
    if (!rows) return cut;
    if (g.cols > int64_t(kNone)) throw std::runtime_error("fastwrs: a tensor has more than 2^32 rows side by side");
    int64_t lists = look.lists;
    const auto shared = [&](int64_t groups, int64_t elements) {
      return sums_bytes<C>(uint32_t(groups), look.sums, limits_.threads) + lists * values_bytes<C>(uint32_t(elements));
    };
    if (unit < kOwnTile) {
      cut.kind = TileKind::kUnits;
      cut.tile = units_per_tile(g, uint32_t(lists));
      // Sums of many short rows take more than their elements.
      while (cut.tile > 1 && shared(cut.tile * g.cols, cut.tile * unit) > kNarrowBytes) cut.tile /= 2;
      cut.tiles = (g.units + cut.tile - 1) / cut.tile;
      cut.shared = shared(cut.tile * g.cols, cut.tile * unit);
    } else {
      cut.kind = TileKind::kPartial;
      cut.tile = std::min(g.cols, kPartialColumns);
      if (g.cols == 1) lists = 0;  // a row, or a part of one, is summed in registers
      const int64_t height = partial_elements_ / cut.tile;
      cut.row_tiles = (g.rows + height - 1) / height;
      cut.tiles = g.units * cut.row_tiles * ((g.cols + cut.tile - 1) / cut.tile);
      cut.shared = shared(cut.tile, partial_elements_);
    }
    cut.shared = std::max<int64_t>(cut.shared, look_bytes<C>(look.sums, limits_.threads));
    cut.wide = cut.shared > kNarrowBytes;
    return cut;
  }

 private:
  int64_t units_per_tile(const Geometry& g, uint32_t lists) const {
    const int64_t unit = g.unit_size();
    if (unit >= kOwnTile) return 1;
    int64_t units = std::max<int64_t>(1, kTileBytes / int64_t(sizeof(C)) / std::max(1u, lists) / unit);
    const int64_t whole = vector_ / std::gcd(unit, vector_);  // so many units are whole vectors: tiles begin aligned
    if (units > whole) units -= units % whole;
    return std::min(units, g.units);
  }
  // Decides between narrow and wide blocks too.
  bool fits(TensorCut& cut, int64_t groups, int64_t elements, const Need& need, bool held, int64_t limit) const {
    cut.shared = tile_shared<C>(groups, elements, need, held, limits_.threads);
    cut.wide = cut.shared > kNarrowBytes;
    return cut.shared <= limit;
  }

  const StepJob& job_;
  const Limits& limits_;
  int64_t vector_, partial_elements_;
};

// A record as bytes: Record<C, Constants> for a step, Control<C> alone for what follows it.
template <class C>
Control<C> control_of(const TensorStep& s) {
  Control<C> c{};
  c.lr = C(s.lr.value);
  c.lr_data = s.lr.data;
  c.lr_is_double = s.lr.dtype == Dtype::kFloat64;
  c.maximize = s.maximize;
  // Step counts are fp32 and stop at 2^24: numbers beyond are never reached, and must not be rounded to one that is.
  const double last = 1 << 24;
  c.every = s.every > last ? C(0) : C(s.every);
  c.start = s.start > last ? C(2 * last) : C(s.start);
  c.stop = s.stop > last ? C(2 * last) : C(s.stop);
  c.target = C(s.target);
  c.rate = C(s.rate);
  c.power = C(s.power);
  return c;
}

template <class Rule, class C>
void append_rule(const TensorStep& s, std::vector<char>& bytes) {
  using Wide = typename Rule::template Constants<double>;
  using Narrow = typename Rule::template Constants<C>;
  Record<C, Narrow> record{};
  record.control = control_of<C>(s);
  if constexpr (!std::is_empty_v<Wide>) {
    constexpr size_t kCount = sizeof(Wide) / sizeof(double);
    static_assert(sizeof(Narrow) == kCount * sizeof(C), "constants are numbers of one type");
    double wide[kCount];
    C narrow[kCount];
    const Wide constants = Rule::constants(s.rule_record);
    std::memcpy(wide, &constants, sizeof wide);
    for (size_t k = 0; k < kCount; ++k) narrow[k] = C(wide[k]);
    std::memcpy(&record.constants, narrow, sizeof narrow);
  }
  const char* begin = reinterpret_cast<const char*>(&record);
  bytes.insert(bytes.end(), begin, begin + sizeof record);
}

template <class C>
void append_record(const StepJob& job, Phase phase, const TensorStep& s, std::vector<char>& bytes) {
  if (phase != Phase::kStep && phase != Phase::kLook) {
    const Control<C> control = control_of<C>(s);
    const char* begin = reinterpret_cast<const char*>(&control);
    bytes.insert(bytes.end(), begin, begin + sizeof control);
    return;
  }
  int index = 0;
#define FASTWRS_RULE(Rule) \
  if (job.rule == index++) append_rule<Rule, C>(s, bytes);
  FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
}

// Collects tensors for one launch.
template <class C>
class Builder {
 public:
  Builder(const StepJob& job, const Limits& limits, const KernelKey& key, bool wide, uint32_t tile_elements)
      : job_(job),
        limits_(limits),
        key_(key),
        wide_(wide),
        arrays_(key.phase == Phase::kStep || (key.phase == Phase::kLook && job.look.changes_states) ? 2 + job.slots
                                                                                                    : 1),
        asks_(key.phase == Phase::kStep && job.look.kind != Look::kNone) {
    header_.tile_elements = tile_elements;
    header_.sum_kinds = job.measured ? kSums : 2;
  }

  bool empty() const { return header_.tensors == 0; }

  // False if the launch is full; then it is as before.
  // `look`: where in the workspace is what was found out, of a step that asks.
  bool add(int64_t i, const TensorCut& cut, int64_t tiles, bool advances, int64_t workspace, int64_t look = -1) {
    const TensorView& view = job_.tensors[i];
    const TensorStep& step = job_.steps[i];
    const size_t records = records_.size(), pool = pool_.size();
    TensorEntry entry{};
    entry.step = step.step;
    if (cut.kind == TileKind::kPartial) {
      entry.partial = {uint32_t(cut.row_tiles), uint32_t(cut.geometry.groups() * cut.row_tiles)};
    } else {
      entry.numel = cut.geometry.numel();
    }
    entry.rows = cut.geometry.rows;
    entry.cols =
        cut.geometry.strided() ? uint32_t(append_walk(cut.geometry, arrays_, pool_)) : uint32_t(cut.geometry.cols);
    entry.first_block = header_.blocks;
    entry.tile = uint32_t(cut.tile);
    entry.measure = kNone;
    if (key_.phase != Phase::kLook && job_.measured && view.norm_row >= 0 && view.reduced != 0)
      entry.measure = uint32_t(append_measure(cut.geometry, view, pool_));
    entry.workspace = uint32_t(workspace);
    entry.record = record_of(step);
    entry.kind = cut.kind;
    entry.flags = (step.fresh ? kFresh : 0) | (advances ? kAdvances : 0);
    const int64_t asked = asks_ ? int64_t(asked_.size()) + kLookNumbers : 0;
    const int64_t bytes = (header_.tensors + 1) * entry_bytes() + int64_t(records_.size() + (pool_.size() + asked) * 8);
    const int64_t blocks = header_.blocks + tiles;
    if (bytes > capacity() || blocks > kMostBlocks || entry.record == kNoRecord) {
      if (empty()) throw std::runtime_error("fastwrs: a tensor is too large, or has too many dimensions, for a launch");
      if (records_.size() > records) group_.pop_back();
      records_.resize(records);
      pool_.resize(pool);
      return false;
    }
    const char* facts = reinterpret_cast<const char*>(&entry);
    entries_.insert(entries_.end(), facts, facts + sizeof entry);
    for (int k = 0; k < arrays_; ++k) {
      const char* data = reinterpret_cast<const char*>(&view.array[k].data);
      entries_.insert(entries_.end(), data, data + sizeof(void*));
    }
    if (asks_) asked_.insert(asked_.end(), {look, cut.geometry.channel_inner, cut.geometry.channels});
    header_.blocks = uint32_t(blocks);
    ++header_.tensors;
    shared_ = std::max(shared_, cut.shared);
    return true;
  }

  // The launch, and this builder as new.
  std::unique_ptr<Launch> finish() {
    auto launch = std::make_unique<Launch>();
    launch->key = key_;
    launch->blocks = std::max(1u, header_.blocks);  // a launch of empty tensors advances their steps
    launch->threads = limits_.threads;
    launch->shared_bytes = uint32_t(shared_);
    header_.records = uint32_t(entries_.size());
    header_.pool = uint32_t(entries_.size() + records_.size() + asked_.size() * 8);
    header_.grad_scale = static_cast<const float*>(job_.grad_scale.data);
    header_.found_inf = static_cast<const float*>(job_.found_inf.data);
    header_.measured = job_.measured;
    header_.ticket = static_cast<uint32_t*>(job_.workspace);
    header_.workspace = static_cast<char*>(job_.workspace) + kTicketBytes;
    char* to = launch->params;
    std::memcpy(to, &header_, sizeof header_);
    to += sizeof header_;
    std::memcpy(to, entries_.data(), entries_.size());
    std::memcpy(to + header_.records, records_.data(), records_.size());
    if (!asked_.empty()) std::memcpy(to + header_.pool - asked_.size() * 8, asked_.data(), asked_.size() * 8);
    if (!pool_.empty()) std::memcpy(to + header_.pool, pool_.data(), pool_.size() * 8);
    const uint32_t tile_elements = header_.tile_elements, sum_kinds = header_.sum_kinds;
    header_ = Header();
    header_.tile_elements = tile_elements;
    header_.sum_kinds = sum_kinds;
    entries_.clear();
    records_.clear();
    pool_.clear();
    asked_.clear();
    group_.clear();
    shared_ = 0;
    return launch;
  }

 private:
  static constexpr uint16_t kNoRecord = 0xffff;

  int64_t entry_bytes() const { return int64_t(sizeof(TensorEntry)) + arrays_ * int64_t(sizeof(void*)); }
  // What of a launch's bytes arrives: a kernel's parameter has room for whole entries, whatever they are used for.
  int64_t capacity() const { return Params<1>::kEntryBytes / entry_bytes() * entry_bytes(); }

  // The place of the group's record, which is appended if it is new. Tensors come group by group.
  uint16_t record_of(const TensorStep& step) {
    for (size_t k = group_.size(); k > 0; --k) {
      if (group_[k - 1] == step.group) return uint16_t(k - 1);
    }
    if (group_.size() >= kNoRecord) return kNoRecord;
    append_record<C>(job_, key_.phase, step, records_);
    group_.push_back(step.group);
    return uint16_t(group_.size() - 1);
  }

  const StepJob& job_;
  const Limits& limits_;
  KernelKey key_;
  bool wide_;
  int arrays_;
  bool asks_;
  Header header_{};
  std::vector<char> entries_, records_;
  std::vector<int64_t> pool_, asked_, group_;
  int64_t shared_ = 0;
};

template <class C>
int64_t plan_launches(const StepJob& job, const Limits& limits, std::vector<std::unique_ptr<Launch>>& launches) {
  const Cutter<C> cutter(job, limits);
  const auto builder = [&](Phase phase, bool walk, bool wide) {
    return Builder<C>(job, limits, KernelKey{phase, job.rule, job.slots, job.dtypes, walk}, wide,
                      uint32_t(cutter.partial_elements()));
  };
  // Tensors whose groups fit tiles: dense and not, narrow blocks and wide ones.
  Builder<C> whole[2][2] = {{builder(Phase::kStep, false, false), builder(Phase::kStep, false, true)},
                            {builder(Phase::kStep, true, false), builder(Phase::kStep, true, true)}};
  // The others, two launches one after the other; three where groups are columns.
  struct Chunk {
    Builder<C> step, finish, project;
    bool columns;
    int64_t bytes, sums;
  };
  const auto new_chunk = [&](bool walk, bool columns) {
    return Chunk{builder(Phase::kStep, walk, true),
                 builder(Phase::kFinish, walk, false),
                 builder(Phase::kProject, walk, true),
                 columns,
                 0,
                 0};
  };
  Chunk chunks[] = {new_chunk(false, false), new_chunk(false, true), new_chunk(true, false)};
  // First passes of a rule that looks: what they leave in the workspace stays there until all is done.
  std::vector<int64_t> looks(job.tensors.size(), -1);
  int64_t look_sums = 0;
  if (job.look.kind != Look::kNone) {
    Builder<C> first[2][2] = {{builder(Phase::kLook, false, false), builder(Phase::kLook, false, true)},
                              {builder(Phase::kLook, true, false), builder(Phase::kLook, true, true)}};
    for (size_t i = 0; i < job.tensors.size(); ++i) {
      const TensorCut cut = cutter.cut_look(int64_t(i));
      if (cut.tiles == 0) continue;
      if (cut.kind != TileKind::kElements) {
        looks[i] = look_sums;
        const int64_t rows = cut.geometry.groups(), parts = cut.kind == TileKind::kPartial ? rows * cut.row_tiles : 0;
        look_sums += job.look.head + job.look.sums * (rows + parts);
        if (look_sums >= int64_t(kNone)) throw std::runtime_error("fastwrs: a list of tensors has too many rows");
      }
      Builder<C>& b = first[cut.geometry.strided()][cut.wide];
      const int64_t place = std::max<int64_t>(0, looks[i]);
      if (b.add(int64_t(i), cut, cut.tiles, false, place)) continue;
      launches.push_back(b.finish());
      b.add(int64_t(i), cut, cut.tiles, false, place);
    }
    for (auto& walk : first) {
      for (Builder<C>& b : walk) {
        if (!b.empty()) launches.push_back(b.finish());
      }
    }
  }
  int64_t most_sums = look_sums;
  for (Chunk& c : chunks) c.sums = look_sums;
  const auto flush = [&](Chunk& c) {
    if (c.step.empty()) return;
    launches.push_back(c.step.finish());
    if (c.columns) launches.push_back(c.finish.finish());
    launches.push_back(c.project.finish());
    most_sums = std::max(most_sums, c.sums);
    c.bytes = 0;
    c.sums = look_sums;
  };

  for (size_t i = 0; i < job.tensors.size(); ++i) {
    const TensorCut cut = cutter.cut(int64_t(i));
    const bool walk = cut.geometry.strided();
    if (cut.kind != TileKind::kPartial) {
      Builder<C>& b = whole[walk][cut.wide];
      if (b.add(int64_t(i), cut, cut.tiles, true, 0, looks[i])) continue;
      launches.push_back(b.finish());
      b.add(int64_t(i), cut, cut.tiles, true, 0, looks[i]);
      continue;
    }
    const bool columns = !walk && cut.geometry.cols > 1;
    Chunk& c = chunks[walk ? 2 : columns];
    const int64_t bytes = cut.geometry.numel() * size_of(job.dtypes.param);
    const int64_t sums = (job.measured ? kSums : 2) * cut.row_tiles * cut.geometry.groups();
    if (c.bytes + bytes > kChunkBytes) flush(c);
    TensorCut finish = cut, project = cut;
    finish.shared = sums_bytes<C>(uint32_t(cut.tile), kSums, limits.threads);
    project.shared = 0;
    const int64_t finish_tiles = cut.tiles / cut.row_tiles;
    for (int attempt = 0; attempt < 2; ++attempt) {
      if (c.step.add(int64_t(i), cut, cut.tiles, false, c.sums, looks[i])) {
        // Their entries are smaller than those of the step.
        if (columns) c.finish.add(int64_t(i), finish, finish_tiles, false, c.sums);
        c.project.add(int64_t(i), project, cut.tiles, true, c.sums);
        break;
      }
      flush(c);
    }
    c.bytes += bytes;
    c.sums += sums + cut.geometry.groups();
    if (c.sums >= int64_t(kNone)) throw std::runtime_error("fastwrs: a list of tensors has too many partial sums");
  }
  for (auto& walk : whole) {
    for (Builder<C>& b : walk) {
      if (!b.empty()) launches.push_back(b.finish());
    }
  }
  for (Chunk& c : chunks) flush(c);
  return kTicketBytes + most_sums * int64_t(sizeof(C));
}

}  // namespace

Plan::Plan(const StepJob& job, const Limits& limits) {
  workspace_bytes_ = job.dtypes.param == Dtype::kFloat64 ? plan_launches<double>(job, limits, launches_)
                                                         : plan_launches<float>(job, limits, launches_);
}

Needs needs(const StepJob& job, int device) {
  const Plan plan(job, limits_of(device));
  return {plan.workspace_bytes(), int64_t(plan.size())};
}

namespace {

void check_workspace(const StepJob& job, const Plan& plan) {
  if (job.workspace_bytes >= plan.workspace_bytes()) return;
  throw std::runtime_error("fastwrs: the workspace has " + std::to_string(job.workspace_bytes) +
                           " bytes, the step needs " + std::to_string(plan.workspace_bytes()));
}

}  // namespace

void check(const StepJob& job, int device) { check_workspace(job, Plan(job, limits_of(device))); }

void step(const StepJob& job, int device, void* stream) {
  const Plan plan(job, limits_of(device));
  check_workspace(job, plan);
  begin(job);
  for (size_t i = 0; i < plan.size(); ++i) run(plan[i], device, stream);
}

}  // namespace fastwrs::cuda
