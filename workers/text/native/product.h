// Rows times a packed weight, on all threads. Above: decoder.cpp. Below: linear.h, amx.h, pool.h.
//
// Threads take a few panels at a time and go through all rows with them, tile by tile, so weights come from memory once.
// What multiplies depends on the weight and the processor (Way), never on the rows: a row is computed alike in any company.
#pragma once
#include <limits>
#include <vector>

#include "amx.h"
#include "linear.h"
#include "pool.h"

namespace hostler {

constexpr int kExpandRows = kDots ? 8 : 16;  // from so many rows on, a quantized panel is widened once for all of them
constexpr size_t kCacheBytes = 512 << 10;    // of a core's second cache, for panels

enum class Way {
  FLOATS,  // vectors of float32; weights widen as they are read
  DOTS,    // rows and weights as pairs of bfloat16, a dot product for each
  PAIRS,   // the same in AMX tiles
  BYTES,   // int8 weights as they are, rows as integers of 16 bits, in AMX tiles
};

inline Way way_of(Kind kind) {
  if (!kDots || kind == Kind::F32) return Way::FLOATS;
  if (!amx::usable()) return Way::DOTS;
  return kind == Kind::I8 ? Way::BYTES : Way::PAIRS;
}

// The rows of a product, as its way wants them.
//   FLOATS  where they are
//   DOTS    (rows, k) bfloat16
//   PAIRS   for each 16 rows, for each 32 inputs: a tile of bfloat16
//   BYTES   for each 16 rows, for each 64 inputs: a tile of high bytes, one of low ones; and what a row's unit is
class Rows {
 public:
  void prepare(Pool& pool, Way way, const float* a, size_t lda, int rows, int k) {
    from_ = reinterpret_cast<const uint8_t*>(a), stride_ = lda * sizeof(float);
    if (way == Way::FLOATS) return;
    const int width = way == Way::PAIRS ? (k + 31) / 32 * 32 : way == Way::BYTES ? (k + 63) / 64 * 64 : k;
    stride_ = size_t(width) * 2;
    const size_t padded = size_t(rows + amx::kRows - 1) / amx::kRows * amx::kRows;
    if (size_ < padded * stride_) bytes_ = allocate<uint8_t>(size_ = padded * stride_);
    if (units_.size() < padded) units_.resize(padded);
    from_ = bytes_.get();
    pool.run((rows + 7) / 8, [&](int block) {
      for (int r = block * 8; r < std::min(rows, block * 8 + 8); ++r) {
        uint8_t* to = bytes_.get() + size_t(r) * stride_;
        if (way == Way::DOTS) narrow_all(a + r * lda, k, reinterpret_cast<bf16*>(to));
        else if (way == Way::PAIRS) amx::lay_out(a + r * lda, k, tile_row(r));
        else units_[r] = halves(a + r * lda, k, tile_row(r));
      }
    });
  }
  const float* at(int row) const { return reinterpret_cast<const float*>(from_ + size_t(row) * stride_); }
  const uint8_t* tiles(int row) const { return from_ + size_t(row) * stride_; }  // of a multiple of 16
  const float* units(int row) const { return units_.data() + row; }
  size_t ld() const { return stride_ / sizeof(float); }

 private:
  uint8_t* tile_row(int r) {
    return bytes_.get() + size_t(r / amx::kRows * amx::kRows) * stride_ + r % amx::kRows * amx::kLine;
  }

  // Rounds a row to multiples of a 32,512th of its greatest input, which is more than bfloat16 keeps of that one: the
  // high byte's steps are 256, the low one counts up from there. A row that is not finite gets a unit that is NaN.
  static float halves(const float* a, int k, uint8_t* to) {
    constexpr float kMost = 127 * 256;
    const float most = peak(a, k);
    const bool finite = most <= std::numeric_limits<float>::max();
    const float inverse = finite && most > 0 ? kMost / most : 0.0f;
    for (int i = 0; i < k; i += 64, to += 2 * amx::kTile) {
      alignas(64) int16_t values[64] = {};
      const int n = std::min(64, k - i);
      for (int j = 0; j < n; ++j) {
        values[j] = int16_t(nearest(a[i + j] * inverse));
      }
      for (int j = 0; j < 64; ++j) to[j] = uint8_t(values[j] >> 8);
      for (int j = 0; j < 64; ++j) to[amx::kTile + j] = uint8_t(values[j]);
    }
    return finite ? most / kMost : NAN;
  }

  Buffer<uint8_t> bytes_;
  size_t size_ = 0, stride_ = 0;
  const uint8_t* from_ = nullptr;
  std::vector<float> units_;
};

// Widens a quantized panel to what products take.
template <class Loader>
void widen_panel(const uint8_t* panel, int k, float* out) {
  for (int i = 0; i < k; i += Loader::kStep)
#pragma GCC unroll 8
    for (int j = 0; j < Loader::kStep; j += 1 + kDots) {
      float* to = out + size_t((i + j) / (1 + kDots)) * kPanel;
      if constexpr (kDots) store(to, Pairs<Loader>::pair(panel, i, j));
      else
        for (int v = 0; v < V; ++v) store(to + v * W, Loader::at(panel, i, j, v));
    }
}

// What is added to a product: to its row r, row slot[r] of `values` (…, panels * 16), or nothing where that is -1.
struct Added {
  const int32_t* slot = nullptr;
  const float* values = nullptr;
  size_t stride = 0;
  void to(float* out, int row, int rows, int panel, int panels) const {
    for (int r = 0; r < rows; ++r) {
      if (slot[row + r] < 0) continue;
      const float* from = values + size_t(slot[row + r]) * stride + size_t(panel) * kPanel;
      for (int p = 0; p < panels; ++p)
        for (int v = 0; v < kPanel; v += W) {
          float* o = out + (p * rows + r) * kPanel + v;
          store(o, load(o) + load(from + p * kPanel + v));
        }
    }
  }
};

// Multiplies `rows` rows of `a` (row r at a + r * lda) with a weight. `done(row, rows, panel, panels, out)` takes each
// finished piece, out[p][r][16], bias, scale and `added` applied; `unit` panels always come in one piece. Runs on the pool.
template <class Done>
void product(Pool& pool, const Weight& w, const float* a, size_t lda, int rows, int unit, const Done& done,
             const Added& added = {}) {
  const Way way = way_of(w.kind);
  const bool matrix = way == Way::PAIRS || way == Way::BYTES;
  const bool expand = way == Way::PAIRS ? w.kind == Kind::I4
                                        : way != Way::BYTES && (w.kind == Kind::I8 || w.kind == Kind::I4) && rows >= kExpandRows;
  const size_t wide_stride = size_t(w.k) * kPanel * (way == Way::FLOATS ? 4 : 2), stride = expand ? wide_stride : w.stride;
  constexpr int kMatrixRows = 2 * amx::kRows;
  const int most = matrix ? kMatrixRows : kRows, tiles = (rows + most - 1) / most;
  int step = !matrix ? wide(std::min(rows, kRows)) : rows <= amx::kRows ? 4 : 2;
  // Half as many panels at once where two tiles would have to fetch all of the next ones, a core's cache would not hold
  // them from tile to tile, or threads would run out of pieces at different times.
  const bool fits = step * stride <= kCacheBytes && w.panels >= 4 * step * pool.size();
  if (tiles == 2 || (tiles > 2 && !fits)) step = std::min(step, 2);
  step = std::max(unit, step);
  thread_local Rows inputs_of_thread;
  Rows& inputs = inputs_of_thread;
  inputs.prepare(pool, way, a, lda, rows, w.k);
  pool.run((w.panels + step - 1) / step, [&](int item) {
    const int first = item * step, panels = std::min(step, w.panels - first);
    alignas(64) float out[std::max(kWide * kRows, 4 * amx::kRows) * kPanel];  // or 2 * kMatrixRows
    thread_local Buffer<float> wide_panels;
    thread_local size_t wide_size = 0;
    const uint8_t* panel = w.panel(first);
    if (expand) {
      const size_t each = wide_stride / 4;
      if (wide_size < panels * each) wide_panels = allocate<float>(wide_size = panels * each);
      for (int p = 0; p < panels; ++p) {
        if (w.kind == Kind::I8) widen_panel<I8Loader>(w.panel(first + p), w.k, wide_panels.get() + p * each);
        else widen_panel<I4Loader>(w.panel(first + p), w.k, wide_panels.get() + p * each);
      }
      panel = reinterpret_cast<const uint8_t*>(wide_panels.get());
    }
    amx::Tiles registers;
    for (int t = 0; t < tiles; ++t) {
      const int row = matrix ? t * most : int(int64_t(rows) * t / tiles);
      const int count = (matrix ? std::min(rows, row + most) : int(int64_t(rows) * (t + 1) / tiles)) - row;
      // Of several tiles each has time to fetch one or two of the panels that this thread will probably take next: the
      // others take those between.
      amx::Ahead ahead;
      const int next = first + panels * pool.size() + t;
      if (tiles > 1 && t < panels && next < w.panels) {
        ahead.memory = w.panel(next);
        if (t + tiles < panels && next + tiles < w.panels) ahead.apart = tiles * w.stride;
      }
      if (matrix) {
        const uint8_t *these = inputs.tiles(row), *more = inputs.tiles(row + amx::kRows);
        if (way == Way::PAIRS) amx::pairs(registers, panel, stride, panels, these, more, count, out, ahead);
        else amx::bytes(registers, panel, stride, panels, these, more, inputs.units(row), count, out, ahead);
      } else {
        const Ahead lines{ahead.memory ? ahead.memory : panel, ahead.apart};
        const float* x = inputs.at(row);
        if (w.kind == Kind::F32 || (expand && !kDots))
          rows_of<F32Loader>(panel, stride, panels, x, inputs.ld(), count, w.k, out, lines);
        else if (w.kind == Kind::BF16 || expand)
          rows_of<Product<BF16Loader>>(panel, stride, panels, x, inputs.ld(), count, w.k, out, lines);
        else if (w.kind == Kind::I8)
          rows_of<Product<I8Loader>>(panel, stride, panels, x, inputs.ld(), count, w.k, out, lines);
        else
          rows_of<Product<I4Loader>>(panel, stride, panels, x, inputs.ld(), count, w.k, out, lines);
      }
      for (int p = 0; p < panels && (w.scales || w.bias); ++p)
        for (int r = 0; r < count; ++r)
          for (int v = 0; v < V; ++v) {
            float* o = out + (p * count + r) * kPanel + v * W;
            vf x_v = load(o);
            if (w.scales) x_v *= load(w.scales.get() + (first + p) * kPanel + v * W);
            if (w.bias) x_v += load(w.bias.get() + (first + p) * kPanel + v * W);
            store(o, x_v);
          }
      if (added.values) added.to(out, row, count, first, panels);
      done(row, count, first, panels, out);
    }
  });
}

}  // namespace hostler
