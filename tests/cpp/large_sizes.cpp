// Sizes above 2^31 through everything that computes an index, with made-up tensors that have no memory. Prints what is
// wrong, one line each, and nothing if all is right.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "core/table.h"
#include "cpu/plan.h"
#include "norms/geometry.h"

namespace {

#define EXPECT(condition) \
  if (!(condition)) std::printf("line %d: %s\n", __LINE__, #condition)

constexpr int64_t kBig = int64_t(1) << 31;

struct Fake {
  std::vector<int64_t> sizes, strides;
  fastwrs::TensorView view;

  Fake(std::vector<int64_t> sizes_, std::vector<int64_t> strides_, int64_t reduced) : sizes(sizes_), strides(strides_) {
    view.arrays = 4;
    for (int k = 0; k < view.arrays; ++k) view.array[k].strides = strides.data();
    view.dims = int(sizes.size());
    view.sizes = sizes.data();
    view.reduced = reduced;
  }
};

fastwrs::cpu::TensorPlan plan_of(const Fake& fake, bool sums) {
  fastwrs::cpu::TensorPlan plan;
  plan.wants[fastwrs::kUpdated] = sums;
  plan.geometry = fastwrs::geometry_of(fake.view, sums);
  plan.cut();
  return plan;
}

void block_map() {
  fastwrs::BlockMap map;
  for (int64_t items : {kBig + 7, int64_t(0), 3 * kBig, int64_t(1)}) map.add(items);
  EXPECT(map.items() == 4 * kBig + 8);
  EXPECT(map.tensor_of(0) == 0);
  EXPECT(map.tensor_of(kBig + 6) == 0);
  EXPECT(map.tensor_of(kBig + 7) == 2);
  EXPECT(map.tensor_of(4 * kBig + 6) == 2);
  EXPECT(map.tensor_of(4 * kBig + 7) == 3);
}

// Many short rows: one pass.
void short_rows() {
  const int64_t rows = 3 * kBig, length = 5;
  const auto plan = plan_of(Fake({rows, length}, {length, 1}, 0b10), true);
  EXPECT(plan.path == fastwrs::cpu::TensorPlan::kOnePass);
  EXPECT(plan.geometry.units == rows && plan.geometry.rows == length);
  EXPECT(plan.geometry.numel() == rows * length && plan.geometry.groups() == rows);
  EXPECT((plan.items - 1) * plan.units_per_item < rows && plan.items * plan.units_per_item >= rows);
}

// Rows that are longer than 2^31: two phases. One group per row; and one per column.
void long_rows() {
  const int64_t length = 2 * kBig + 3;
  for (const auto& plan : {plan_of(Fake({3, length}, {length, 1}, 0b10), true),
                           plan_of(Fake({length, 3}, {3, 1}, 0b01), true), plan_of(Fake({length}, {1}, 0), false)}) {
    const int64_t last = plan.items - 1;
    const auto block = plan.block(last);
    EXPECT(plan.items * plan.rows_per_item * plan.strip >= plan.geometry.numel());
    EXPECT(block.rows > 0 && block.columns > 0);
    const int64_t first = block.unit * plan.geometry.unit_size() + block.first_row * plan.geometry.cols;
    EXPECT(first + block.first_column + (block.rows - 1) * plan.geometry.cols + block.columns == plan.geometry.numel());
  }
  EXPECT(fastwrs::cpu::Accumulator<float>::levels_for(1, length) > 20);
}

// Strides above 2^31 are walked as they are, and norms find their rows.
void strides() {
  const Fake gaps({4, 6}, {kBig + 5, 1}, 0b10);
  const auto g = fastwrs::geometry_of(gaps.view, true);
  EXPECT(g.strided() && g.walk[0].stride[0] == kBig + 5 && g.walk[0].stride[3] == kBig + 5);
  const int64_t wide = kBig + 1;
  const Fake turned({wide, 2, 3}, {1, wide, 2 * wide}, 0b100);  // stored the other way round
  const auto t = fastwrs::geometry_of(turned.view, true);
  EXPECT(t.groups() == 2 * wide);
  EXPECT(t.norm_row(t.groups() - 1) == 2 * wide - 1);
  EXPECT(fastwrs::group_count(turned.view) == 2 * wide);
}

}  // namespace

int main() {
  block_map();
  short_rows();
  long_rows();
  strides();
}
