#include "table.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "../norms/geometry.h"

namespace fastwrs::triton {
namespace {

// X(name): lists in the order of table.py.
// clang-format off: it moves a name in these each time that it is run
#define FASTWRS_HEADER(X) \
  X(tensors) X(tiles) X(project_tiles) X(gate_tiles) X(records) X(record_numbers) X(pool) X(tickets) X(step_map) \
  X(project_map) X(gate_map) X(grad_scale) X(found_inf) X(measured) X(ticket) X(workspace)
#define FASTWRS_ENTRY(X) \
  X(param) X(grad) X(state0) X(state1) X(state2) X(step) X(lr) X(flags) X(kind) X(numel) X(unit) X(rows) X(cols) \
  X(units_per_tile) X(first_tile) X(first_project) X(first_gate) X(first_ticket) X(record) X(partial) X(per_sum) \
  X(row_tiles) X(measure) X(walk) X(groups) X(gate)
#define FASTWRS_GATE(X) X(channels) X(channel_inner) X(programs) X(lanes)
// clang-format on
#define FASTWRS_KINDS(X) X(units) X(long) X(partial) X(strip) X(nothing)
#define FASTWRS_FLAGS(X) X(fresh) X(lr_is_double) X(aligned) X(grouped)

#define FASTWRS_NAME(name) k_##name,
namespace header {
enum { FASTWRS_HEADER(FASTWRS_NAME) kWords };
}
namespace entry {
enum { FASTWRS_ENTRY(FASTWRS_NAME) kWords };
}
namespace gate {
enum { FASTWRS_GATE(FASTWRS_NAME) kWords };
}
namespace kind {
enum { FASTWRS_KINDS(FASTWRS_NAME) };
}
namespace flag {
enum { FASTWRS_FLAGS(FASTWRS_NAME) };
}
#undef FASTWRS_NAME

constexpr int64_t kTicketBytes = 16;
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kMostTiles = 0x7fffffff;
// Norm groups of a unit that is held in registers, each of which costs a pass over these: 9 are a kernel of 3 x 3.
constexpr int64_t kMostColsHeld = 16;

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }
int64_t address(const void* pointer) { return int64_t(reinterpret_cast<uintptr_t>(pointer)); }

// What a tensor becomes: its entry, how many programs it gets in each launch, tickets, and sums in the workspace.
struct Cut {
  int64_t entry[entry::kWords] = {};
  int64_t tiles = 0, project_tiles = 0, tickets = 0, sums = 0;
};

int64_t shortest_bytes(const Dtypes& d) { return std::min({size_of(d.param), size_of(d.grad), size_of(d.state)}); }

void cut_into_tiles(const StepJob& job, const TensorStep& step, const Geometry& g, const Sizes& sizes, bool grouped,
                    bool four_sums, Cut& cut) {
  int64_t* e = cut.entry;
  const int64_t numel = g.numel();
  e[entry::k_units_per_tile] = 1;
  if (!grouped) {
    e[entry::k_unit] = e[entry::k_rows] = sizes.tile;
    e[entry::k_cols] = 1;
    cut.tiles = divide_up(numel, sizes.tile);
    return;
  }
  const int64_t unit = g.unit_size();
  e[entry::k_unit] = unit;
  e[entry::k_rows] = g.rows;
  e[entry::k_cols] = g.cols;
  if (unit <= sizes.tile) {
    // As many units as fit; if possible so many that the next tile begins on a vector.
    const int64_t fit = sizes.tile / unit, vector = kVectorBytes / shortest_bytes(job.dtypes);
    const int64_t multiple = vector / std::gcd(unit, vector);
    e[entry::k_units_per_tile] = fit >= multiple ? fit / multiple * multiple : fit;
    cut.tiles = divide_up(g.units, e[entry::k_units_per_tile]);
    return;
  }
  const bool cols_fit = g.cols == 1 || (step.rate == 0 && g.cols <= kMostColsHeld);
  if (unit <= sizes.tile * sizes.held && !g.strided() && !four_sums && cols_fit) {
    e[entry::k_kind] = kind::k_long;
    cut.tiles = g.units;
    return;
  }
  // No program holds a whole unit: sums of each part go to the workspace, where the last program of some columns makes
  // factors of them, and a further launch scales.
  const bool one = g.cols == 1;
  e[entry::k_kind] = one ? kind::k_partial : kind::k_strip;
  const int64_t row_tiles = divide_up(g.rows, one ? sizes.tile : sizes.height);
  e[entry::k_row_tiles] = row_tiles;
  e[entry::k_per_sum] = g.units * row_tiles * g.cols;
  cut.tickets = g.units * divide_up(g.cols, sizes.width);
  cut.tiles = cut.project_tiles = cut.tickets * row_tiles;
  cut.sums = (four_sums ? 4 : 1) * e[entry::k_per_sum] + g.groups();
}

// Norm groups as columns of a unit, but where every element is a group.
Geometry geometry_to_cut(const TensorView& view, bool grouped) {
  Geometry g = geometry_of(view, grouped);
  if (g.rows == 1) {
    g.units *= g.cols;
    g.cols = 1;
  }
  return g;
}

Cut cut_of(const StepJob& job, const TensorView& view, const TensorStep& step, const Sizes& sizes, bool grouped,
           bool four_sums, const Geometry& g, std::vector<int64_t>& pool) {
  const bool walk = g.strided();
  Cut cut;
  int64_t* e = cut.entry;
  int64_t together = 0;
  for (int k = 0; k < view.arrays; ++k) {
    e[entry::k_param + k] = address(view.array[k].data);
    together |= address(view.array[k].data);
  }
  e[entry::k_step] = address(step.step);
  e[entry::k_lr] = address(step.lr.data);
  e[entry::k_flags] = int64_t(step.fresh) << flag::k_fresh |
                      int64_t(step.lr.data && step.lr.dtype == Dtype::kFloat64) << flag::k_lr_is_double |
                      int64_t(!walk && together % kVectorBytes == 0) << flag::k_aligned |
                      int64_t(view.reduced != 0) << flag::k_grouped;
  e[entry::k_record] = step.group;
  e[entry::k_numel] = g.numel();
  e[entry::k_measure] = e[entry::k_gate] = -1;
  e[entry::k_walk] = walk ? append_walk(g, view.arrays, pool) : -1;
  if (g.numel() > 0) {
    cut_into_tiles(job, step, g, sizes, grouped, four_sums, cut);
  } else {
    e[entry::k_kind] = kind::k_nothing;
    e[entry::k_unit] = 1;
  }
  return cut;
}

// A tensor without elements has figures all the same.
void add_measure(const TensorView& view, const Geometry& g, const Sizes& sizes, Cut& cut, std::vector<int64_t>& pool) {
  cut.entry[entry::k_measure] = append_measure(g, view, pool);
  if (g.numel() == 0) {
    cut.entry[entry::k_groups] = group_count(view);
    cut.tiles = divide_up(cut.entry[entry::k_groups], sizes.tile);
  }
}

// Of a rule that looks first, what its first launch does with a tensor: an entry that is cut by rows of dimension 0,
// then the words of a gate. `walked` counts those that have to be walked by strides. Nothing, if there would be no sums
// to make and no states to change.
Cut add_look(const StepJob& job, size_t i, const Sizes& sizes, const Geometry& updated, int64_t partial, int64_t ticket,
             std::vector<int64_t>& pool, int64_t& walked, Cut& cut) {
  const TensorView view = view_of_rows(job.tensors[i], job.look.changes_states ? job.tensors[i].arrays : 1);
  const bool rows = job.steps[i].looks && view.reduced != 0;
  if (!rows && !job.look.changes_states) return Cut();
  const Geometry g = geometry_to_cut(view, rows);
  Cut look = cut_of(job, view, job.steps[i], sizes, rows, true, g, pool);
  int64_t* e = look.entry;
  look.sums = 0;
  look.tickets = 1;
  int64_t words[gate::kWords] = {updated.channels, updated.channel_inner, look.tiles, 1};
  if (rows && look.tiles > 0) {
    const int64_t channels = e[entry::k_groups] = g.groups();
    if (e[entry::k_kind] == kind::k_units) {
      e[entry::k_row_tiles] = 1;
      e[entry::k_per_sum] = channels;
    }
    int64_t& lanes = words[gate::k_lanes];
    while (2 * lanes <= e[entry::k_row_tiles] && 2 * lanes * channels <= sizes.tile / 2) lanes *= 2;
    look.sums = job.look.sums * e[entry::k_per_sum] + job.look.head + job.look.each * channels;
  }
  e[entry::k_partial] = partial;
  e[entry::k_first_ticket] = ticket;
  walked += g.strided() && look.tiles > 0;
  cut.entry[entry::k_gate] = int64_t(pool.size());
  pool.insert(pool.end(), e, e + entry::kWords);
  pool.insert(pool.end(), words, words + gate::kWords);
  return look;
}

// Numbers in the compute type, two to a word where that is fp32.
template <class C>
void append_numbers(const std::vector<double>& numbers, std::vector<int64_t>& words) {
  const std::vector<C> narrow(numbers.begin(), numbers.end());
  const size_t place = words.size(), bytes = narrow.size() * sizeof(C);
  words.resize(place + (bytes + 7) / 8);
  std::memcpy(words.data() + place, narrow.data(), bytes);
}

// Which tensor each program of a launch works on: `first` is the word of an entry that says where its programs begin.
void write_map(const int64_t* entries, int64_t tensors, int first, int64_t tiles, int64_t* words) {
  int32_t* map = reinterpret_cast<int32_t*>(words);
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t begin = entries[i * entry::kWords + first];
    const int64_t end = i + 1 < tensors ? entries[(i + 1) * entry::kWords + first] : tiles;
    std::fill(map + begin, map + end, int32_t(i));
  }
}

}  // namespace

Needs fill_table(const StepJob& job, const std::vector<double>& records, int64_t width, const Sizes& sizes, bool walk,
                 int64_t* table, int64_t room) {
  static thread_local std::vector<int64_t> words, pool;
  words.assign(header::kWords, 0);
  pool.clear();
  Needs needs;
  const bool looks = job.look.kind != Look::kNone;
  int64_t sums = 0, tickets = 0;
  for (size_t i = 0; i < job.tensors.size(); ++i) {
    const TensorView& view = job.tensors[i];
    const TensorStep& step = job.steps[i];
    const bool measured = job.measured && view.reduced != 0;
    const bool grouped = view.reduced != 0 && (step.every > 0 || step.rate != 0 || measured);
    const Geometry g = geometry_to_cut(view, grouped);
    if (g.strided() != walk) {
      ++needs.others;
      continue;
    }
    Cut cut = cut_of(job, view, step, sizes, grouped, measured, g, pool);
    if (measured) add_measure(view, g, sizes, cut, pool);
    cut.entry[entry::k_first_tile] = needs.tiles;
    cut.entry[entry::k_first_project] = needs.project_tiles;
    cut.entry[entry::k_first_gate] = needs.gate_tiles;
    cut.entry[entry::k_first_ticket] = tickets;
    cut.entry[entry::k_partial] = sums;
    needs.tiles += cut.tiles;
    needs.project_tiles += cut.project_tiles;
    tickets += cut.tickets;
    sums += cut.sums;
    if (looks) {
      const Cut look = add_look(job, i, sizes, g, sums, tickets, pool, needs.walked_gates, cut);
      needs.gate_tiles += look.tiles;
      tickets += look.tickets;
      sums += look.sums;
    }
    ++needs.tensors;
    words.insert(words.end(), cut.entry, cut.entry + entry::kWords);
  }
  if (std::max({needs.tiles, needs.project_tiles, needs.gate_tiles}) > kMostTiles) {
    throw std::runtime_error("fastwrs: the tensors are too large for one launch");
  }
  const bool wide = job.dtypes.param == Dtype::kFloat64;
  needs.workspace_bytes = kTicketBytes + sums * (wide ? 8 : 4);

  const auto address_of = [](const Number& number) { return address(number.data); };
  const int64_t numbers_at = int64_t(words.size());
  if (wide) {
    append_numbers<double>(records, words);
  } else {
    append_numbers<float>(records, words);
  }
  const int64_t pool_at = int64_t(words.size());
  words.insert(words.end(), pool.begin(), pool.end());
  const int64_t tickets_at = int64_t(words.size());
  const int64_t maps_at = tickets_at + divide_up(tickets, 2);
  const int64_t project_at = maps_at + divide_up(needs.tiles, 2);
  const int64_t gate_at = project_at + divide_up(needs.project_tiles, 2);
  needs.words = gate_at + divide_up(needs.gate_tiles, 2);

  int64_t* h = words.data();
  h[header::k_tensors] = needs.tensors;
  h[header::k_tiles] = needs.tiles;
  h[header::k_project_tiles] = needs.project_tiles;
  h[header::k_gate_tiles] = needs.gate_tiles;
  h[header::k_records] = numbers_at;
  h[header::k_record_numbers] = width;
  h[header::k_pool] = pool_at;
  h[header::k_tickets] = tickets_at;
  h[header::k_step_map] = maps_at;
  h[header::k_project_map] = project_at;
  h[header::k_gate_map] = gate_at;
  h[header::k_grad_scale] = address_of(job.grad_scale);
  h[header::k_found_inf] = address_of(job.found_inf);
  h[header::k_measured] = address(job.measured);
  h[header::k_ticket] = address(job.workspace);
  h[header::k_workspace] = address(job.workspace) + kTicketBytes;
  if (needs.words > room) return needs;

  // The maps follow from the header and from where the programs of each tensor begin. Tickets are always 0 here, and
  // lie before the maps, so that other tickets mean another header.
  bool same_maps = std::equal(h, h + header::k_grad_scale, table);
  for (int64_t i = 0; same_maps && i < needs.tensors; ++i) {
    const int64_t at = header::kWords + i * entry::kWords;
    same_maps =
        std::equal(h + at + entry::k_first_tile, h + at + entry::k_first_gate + 1, table + at + entry::k_first_tile);
  }
  if (!same_maps) {
    const int64_t* entries = h + header::kWords;
    int64_t* t = table;
    if (needs.words > tickets_at) std::fill(t + tickets_at, t + needs.words, 0);
    write_map(entries, needs.tensors, entry::k_first_tile, needs.tiles, t + maps_at);
    write_map(entries, needs.tensors, entry::k_first_project, needs.project_tiles, t + project_at);
    write_map(entries, needs.tensors, entry::k_first_gate, needs.gate_tiles, t + gate_at);
    needs.changed = needs.words;
  } else {
    needs.changed = tickets_at;
    while (needs.changed > 0 && h[needs.changed - 1] == table[needs.changed - 1]) --needs.changed;
  }
  std::copy(words.begin(), words.end(), table);
  return needs;
}

std::string layout() {
#define FASTWRS_NAME(name) " " #name
  return "header:" FASTWRS_HEADER(FASTWRS_NAME) "\nentry:" FASTWRS_ENTRY(FASTWRS_NAME)  //
      "\ngate:" FASTWRS_GATE(FASTWRS_NAME) "\nkinds:" FASTWRS_KINDS(FASTWRS_NAME) "\nflags:" FASTWRS_FLAGS(
          FASTWRS_NAME);
#undef FASTWRS_NAME
}

}  // namespace fastwrs::triton
