// The passes over rows: one mechanism that runs any operation of pass_ops-inl.h on any storage type.
#pragma once

#include <cstdint>
#include <cstring>

#include "pass_ops-inl.h"
#include "pass_plan-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

template <class Op, class T>
struct RowPass {
  using A = AccumOf<T>;
  using V = VecOf<T>;
  static constexpr int kLanes = kLanesOf<T>;

  const PassArgs& a;
  const Plan& plan;
  const Constants<A>& constants;
  const Partials& partials;
  int64_t in_pitch[kMaxInputs], out_pitch, more_pitch[kMaxMore];  // of a row of the plan

  // One block of a work item: the pointers stand at its first row and lane.
  struct Block {
    const T* in[kMaxInputs];
    T* out;
    T* more[kMaxMore];
    const A* k[kMaxConstants];
    A* sums;  // kChunk + kPad apart
  };

  // What the step before apply() works on.
  struct Row {
    alignas(64) A pending[kChunk + kPad], result[kChunk + kPad];
  };

  template <bool kPart>
  inline void load_operands(const Block& b, int64_t r, int c, int n, V* x, V* k) const {
    for (int i = 0; i < Op::kInputs; ++i) x[i] = load_lanes<T, kPart>(b.in[i] + r * in_pitch[i] + c, n);
    for (int i = 0; i < Op::kConstants; ++i) k[i] = load(b.k[i] + c);
  }

  template <bool kPart>
  inline void pend(const Block& b, int64_t r, int c, int n, Row& row) const {
    V x[Op::kInputs + 1], k[Op::kConstants + 1];
    load_operands<kPart>(b, r, c, n, x, k);
    store((Op::kStep == Step::value ? row.result : row.pending) + c, Op::pending(x, k));
    if constexpr (Op::kStep == Step::gradient) store(row.result + c, x[0]);
  }

  inline void step(const Block& b, int64_t r, int n, Row& row) const {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) pend<false>(b, r, c, kLanes, row);
    if (c < n) pend<true>(b, r, c, n - c, row);
    if constexpr (Op::kStep == Step::value) activate_row(row.result, n, a.act);
    else gradient_row(row.result, row.pending, n, a.act);
  }

  template <bool kPart>
  inline void lanes(const Block& b, int64_t r, int c, int n, V floor, [[maybe_unused]] const Row& row) const {
    V x[Op::kInputs + 1], k[Op::kConstants + 1], s[Op::kSums + 1];
    load_operands<kPart>(b, r, c, n, x, k);
    if constexpr (Op::kStep != Step::none) x[Op::kInputs] = load(row.result + c);
    for (int i = 0; i < Op::kSums; ++i) s[i] = load(b.sums + i * (kChunk + kPad) + c);
    V y;
    if constexpr (kMore<Op> > 0) {
      V more[kMore<Op>];
      y = Op::apply(x, k, s, floor, more);
      for (int i = 0; i < kMore<Op>; ++i) store_lanes<T, kPart>(b.more[i] + r * more_pitch[i] + c, more[i], n);
    } else {
      y = Op::apply(x, k, s, floor);
    }
    if constexpr (Op::kWrites) store_lanes<T, kPart>(b.out + r * out_pitch + c, y, n);
    for (int i = 0; i < Op::kSums; ++i) store(b.sums + i * (kChunk + kPad) + c, s[i]);
  }

  void item(int64_t tile, int64_t chunk) const {
    const int64_t from = chunk * kChunk;
    const int n = int(least(kChunk, plan.lanes_of(tile) - from));
    if (n <= 0) return;  // a chunk behind the end of the rest
    alignas(64) A sums[(Op::kSums + 1) * (kChunk + kPad)];
    double* totals[Op::kSums + 1];
    for (int i = 0; i < Op::kSums; ++i) {
      totals[i] = partials.at(tile, i) + from;
      for (int c = 0; c < n; ++c) totals[i][c] = 0;
    }
    [[maybe_unused]] const V floor = V{} + (a.act.is_relu() ? A(0) : -A(__builtin_inf()));
    [[maybe_unused]] Moments<T> moments;
    [[maybe_unused]] Row row_of_step;
    const int64_t start = plan.start(tile), rows = plan.count(tile);
    for (int64_t r = 0; r < rows; r += plan.block) {
      const int64_t height = least(plan.block, rows - r);
      if constexpr (Op::kInputs > 0) {
        Block b;
        for (int i = 0; i < Op::kInputs; ++i) b.in[i] = row<T>(a.in[i], start + r, plan.fold) + from;
        b.out = Op::kWrites ? row<T>(a.out, start + r, plan.fold) + from : nullptr;
        for (int i = 0; i < kMore<Op>; ++i) b.more[i] = row<T>(a.more[i], start + r, plan.fold) + from;
        for (int i = 0; i < Op::kConstants; ++i) b.k[i] = constants.at(i) + from;
        b.sums = sums;
        std::memset(sums, 0, sizeof(sums));
        for (int64_t j = 0; j < height; ++j) {
          if constexpr (Op::kStep != Step::none) step(b, j, n, row_of_step);
          int c = 0;
          for (; c + kLanes <= n; c += kLanes) lanes<false>(b, j, c, kLanes, floor, row_of_step);
          if (c < n) lanes<true>(b, j, c, n - c, floor, row_of_step);
        }
        for (int i = 0; i < Op::kSums; ++i)
          for (int c = 0; c < n; ++c) totals[i][c] += double(sums[i * (kChunk + kPad) + c]);
      }
      if constexpr (Op::kMeasures)
        if (a.measured.data != nullptr)
          measure_block<T>(row<T>(a.measured, start + r, plan.fold) + from, a.measured.pitch * plan.fold, height, n, r,
                           partials.at(tile, Op::kSums) + from, partials.at(tile, Op::kSums + 1) + from, moments);
    }
  }
};

template <class Op, class T>
void run_rows(const PassArgs& a, Parallel parallel) {
  using A = AccumOf<T>;
  bool dense = a.measured.data == nullptr || a.measured.pitch == a.channels;
  for (int i = 0; i < Op::kInputs; ++i) dense = dense && a.in[i].pitch == a.channels;
  if (Op::kWrites) dense = dense && a.out.pitch == a.channels;
  for (int i = 0; i < kMore<Op>; ++i) dense = dense && a.more[i].pitch == a.channels;
  const Plan plan = plan_of(a.rows, a.channels, dense ? fold_of(a.channels) : 1, 2 * kMostBlockRows);
  const Constants<A> constants(plan, a.constants, Op::kConstants);
  const Partials partials(plan, Op::kSums + (a.measured.data != nullptr ? 2 : 0));
  RowPass<Op, T> pass{a, plan, constants, partials, {}, a.out.pitch * plan.fold, {}};
  for (int i = 0; i < Op::kInputs; ++i) pass.in_pitch[i] = a.in[i].pitch * plan.fold;
  for (int i = 0; i < kMore<Op>; ++i) pass.more_pitch[i] = a.more[i].pitch * plan.fold;
  run_parallel(parallel, plan.all_tiles() * plan.chunks, a.rows * a.channels,
               [&](int64_t i) { pass.item(i / plan.chunks, i % plan.chunks); });
  merge<A>(a, plan, partials, Op::kSums, parallel);
}

template <class Op>
void run(const PassArgs& a, Parallel parallel) {
  switch (a.storage) {
    case Storage::f32: return run_rows<Op, float>(a, parallel);
    case Storage::f64: return run_rows<Op, double>(a, parallel);
    case Storage::bf16: return run_rows<Op, Bfloat16>(a, parallel);
    case Storage::f16: return run_rows<Op, Float16>(a, parallel);
  }
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
