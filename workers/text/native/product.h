// Rows times a packed weight, on all threads. Above: decoder.cpp. Below: linear.h, amx.h, pool.h.
//
// Threads take a few panels at a time and go through all rows with them, tile by tile, so weights come from memory once.
// What multiplies depends on the weight and the processor (Way), never on the rows: a row is computed alike in any company.
#pragma once
#include <limits>
#include <utility>
#include <vector>

#include "amx.h"
#include "linear.h"
#include "pool.h"

namespace hostler {

constexpr int kExpandRows = kDots ? 8 : 16;  // from so many rows on, a quantized panel is widened once for all of them
constexpr size_t kCacheBytes = 512 << 10;    // of a core's second cache, for panels
constexpr int kTileRows = 2 * amx::kRows;    // that AMX multiplies at once

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

inline bool in_tiles(Way way) { return way == Way::PAIRS || way == Way::BYTES; }

// The rows of a product as its way wants them, made by whoever computes them. FLOATS are taken where they are.
//   DOTS    (rows, k) bfloat16
//   PAIRS   for each 16 rows, for each 32 inputs: a tile of bfloat16
//   BYTES   for each 16 rows, for each 64 inputs: a tile of high bytes, one of low ones; and what a row's unit is
class Rows {
 public:
  // Makes room for so many rows of k inputs, not FLOATS; what was there is lost.
  void begin(Way way, int rows, int k) {
    way_ = way, k_ = k;
    const int width = way == Way::PAIRS ? (k + 31) / 32 * 32 : way == Way::BYTES ? (k + 63) / 64 * 64 : k;
    stride_ = size_t(width) * sizeof(bf16);
    const size_t padded = size_t(rows + amx::kRows - 1) / amx::kRows * amx::kRows;
    if (size_ < padded * stride_) bytes_ = allocate<uint8_t>(size_ = padded * stride_);
    if (way == Way::BYTES && units_.size() < padded) units_.resize(padded);
    from_ = bytes_.get();
  }

  // Puts a whole row.
  void set(int r, const float* row) {
    if (way_ == Way::DOTS) narrow_all(row, k_, reinterpret_cast<bf16*>(bytes_.get() + size_t(r) * stride_));
    else if (way_ == Way::PAIRS) amx::lay_out(row, k_, tile_row(r));
    else units_[r] = halves(row, k_, tile_row(r));
  }

  // Whether rows may come in pieces, too: BYTES want to know a row's greatest input first.
  bool takes_pieces() const { return way_ != Way::BYTES; }

  // Puts inputs i … i + 15 of a row, i a multiple of 16, as far as there are so many.
  void set_piece(int r, int i, const float* piece) {
    const int n = std::min(kPanel, k_ - i);
    if (way_ == Way::DOTS) return narrow_all(piece, n, reinterpret_cast<bf16*>(bytes_.get() + size_t(r) * stride_) + i);
    auto* line = reinterpret_cast<bf16*>(tile_row(r) + i / 32 * amx::kTile);
    narrow_all(piece, n, line + i % 32);
    if (i + n == k_) std::fill(line + i % 32 + n, line + 32, 0);
  }

  // Takes rows of `a` (row r at a + r * lda), as they are where that can be. In tiles, row r stands at slot[r].
  void take(Pool& pool, Way way, const float* a, size_t lda, int rows, int k, const int32_t* slot = nullptr) {
    if (way == Way::FLOATS) {
      way_ = way, k_ = k, stride_ = lda * sizeof(float), from_ = reinterpret_cast<const uint8_t*>(a);
      return;
    }
    if (!in_tiles(way)) slot = nullptr;
    begin(way, slot && rows ? slot[rows - 1] + 1 : rows, k);
    pool.run((rows + 7) / 8, [&](int block) {
      for (int r = block * 8; r < std::min(rows, block * 8 + 8); ++r) set(slot ? slot[r] : r, a + r * lda);
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
      for (int j = 0; j < n; ++j) values[j] = int16_t(nearest(a[i + j] * inverse));
      for (int j = 0; j < 64; ++j) to[j] = uint8_t(values[j] >> 8);
      for (int j = 0; j < 64; ++j) to[amx::kTile + j] = uint8_t(values[j]);
    }
    return finite ? most / kMost : NAN;
  }

  Way way_ = Way::FLOATS;
  int k_ = 0;
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

// Some rows times a weight, cut into pieces of a few panels.
struct Job {
  const Weight* weight;
  int row, slot, rows;  // the first row, where it stands in tiles, and how many
  int threads;          // that probably share the pieces
  Way way;
  bool expand;  // a quantized panel is widened once for all rows
  int most, tiles, step;  // rows of a tile; how many tiles; panels of a piece
  size_t stride;          // bytes of a panel as it is multiplied

  Job(int num_threads, const Weight& w, int first, int first_slot, int count, int unit)
      : weight(&w), row(first), slot(first_slot), rows(count), threads(num_threads), way(way_of(w.kind)) {
    const bool quantized = w.kind == Kind::I8 || w.kind == Kind::I4;
    expand = way == Way::PAIRS ? w.kind == Kind::I4 : way != Way::BYTES && quantized && rows >= kExpandRows;
    stride = expand ? size_t(w.k) * kPanel * (way == Way::FLOATS ? 4 : 2) : w.stride;
    most = in_tiles(way) ? kTileRows : kRows;
    tiles = (rows + most - 1) / most;
    step = way == Way::PAIRS && tiles > 1 ? 2 : in_tiles(way) ? 4 : wide(std::min(rows, kRows));
    // Half as many panels at once where two tiles would have to fetch all of the next ones, a core's cache would not hold
    // them from tile to tile, or threads would run out of pieces at different times.
    const bool fits = step * stride <= kCacheBytes && w.panels >= 4 * step * threads;
    if ((tiles == 2 && !in_tiles(way)) || (tiles > 1 && !fits)) step = std::min(step, 2);
    step = std::max(unit, step);
  }
  int pieces() const { return (weight->panels + step - 1) / step; }
};

// The panels of a job's piece as they are multiplied: where they lie, or widened.
inline const uint8_t* panels_of_piece(const Job& job, int first, int panels) {
  thread_local Buffer<float> wide_panels;
  thread_local size_t wide_size = 0;
  const Weight& w = *job.weight;
  if (!job.expand) return w.panel(first);
  const size_t each = job.stride / 4;
  if (wide_size < panels * each) wide_panels = allocate<float>(wide_size = panels * each);
  for (int p = 0; p < panels; ++p) {
    if (w.kind == Kind::I8) widen_panel<I8Loader>(w.panel(first + p), w.k, wide_panels.get() + p * each);
    else widen_panel<I4Loader>(w.panel(first + p), w.k, wide_panels.get() + p * each);
  }
  return reinterpret_cast<const uint8_t*>(wide_panels.get());
}

// Hands out a tile's sums: `panels` from `first` on.
template <class Done>
void finish(const Weight& w, int row, int count, int first, int panels, float* out, const Added& added, const Done& done) {
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

// A piece of many rows in tiles of pairs. As much of its panels as a core's first cache holds serves all rows before the rest
// does; sums wait meanwhile.
template <class Done>
void multiply_tiles(const Job& job, const Rows& inputs, int piece, const Added& added, const Done& done) {
  constexpr size_t kDeep = 18 * amx::kTile, kSums = 2 * kTileRows * kPanel;
  thread_local Buffer<float> sums;
  thread_local size_t size = 0;
  const Weight& w = *job.weight;
  const int first = piece * job.step, panels = std::min(job.step, w.panels - first);
  const uint8_t* panel = panels_of_piece(job, first, panels);
  if (size < job.tiles * kSums) sums = allocate<float>(size = job.tiles * kSums);
  // The panels that this thread will probably take next come in meanwhile, a share with each tile of rows.
  const int next = first + job.step * job.threads, coming = std::min(job.step, w.panels - next);
  const size_t share = coming > 0 ? coming * w.stride / (job.tiles * ((job.stride + amx::kTile - 1) / amx::kTile)) : 0;
  amx::Fetch fetch{coming > 0 ? w.panel(next) : nullptr, (share + amx::kLine - 1) / amx::kLine};
  amx::Tiles registers;
  for (size_t from = 0; from < job.stride; from += kDeep) {
    const amx::Lines lines(job.stride, from, kDeep);
    for (int t = 0; t < job.tiles; ++t) {
      const int row = t * kTileRows, count = std::min(kTileRows, job.rows - row), at = job.slot + row;
      float* out = sums.get() + t * kSums;
      amx::pairs(registers, panel, panels, lines, inputs.tiles(at), inputs.tiles(at + amx::kRows), count, out, fetch);
      fetch.from += fetch.lines * amx::kLine * ((lines.end - lines.begin) / amx::kTile);
      if (lines.end == job.stride) finish(w, job.row + row, count, first, panels, out, added, done);
    }
  }
}

// Computes one piece; see `products`.
template <class Done>
void multiply(const Job& job, const Rows& inputs, int piece, const Added& added, const Done& done) {
  if (job.way == Way::PAIRS && job.tiles > 1) return multiply_tiles(job, inputs, piece, added, done);
  const Weight& w = *job.weight;
  const int first = piece * job.step, panels = std::min(job.step, w.panels - first);
  const uint8_t* panel = panels_of_piece(job, first, panels);
  alignas(64) float out[std::max(kWide * kRows, 4 * kTileRows) * kPanel];
  amx::Tiles registers;
  for (int t = 0; t < job.tiles; ++t) {
    const int begin = in_tiles(job.way) ? t * job.most : int(int64_t(job.rows) * t / job.tiles);
    const int end = in_tiles(job.way) ? std::min(job.rows, begin + job.most) : int(int64_t(job.rows) * (t + 1) / job.tiles);
    const int row = job.row + begin, count = end - begin;
    if (in_tiles(job.way)) {
      const int at = job.slot + begin;
      const uint8_t *these = inputs.tiles(at), *more = inputs.tiles(at + amx::kRows);
      if (job.way == Way::PAIRS) amx::pairs(registers, panel, panels, amx::Lines(job.stride), these, more, count, out);
      else amx::bytes(registers, panel, job.stride, panels, these, more, inputs.units(at), count, out);
    } else {
      // Of several tiles each has time to fetch one or two of the panels that this thread will probably take next: the
      // others take those between.
      Ahead lines{panel};
      const int next = first + panels * job.threads + t;
      if (job.tiles > 1 && t < panels && next < w.panels) {
        lines.memory = w.panel(next);
        if (t + job.tiles < panels && next + job.tiles < w.panels) lines.apart = job.tiles * w.stride;
      }
      const float* x = inputs.at(row);
      if (w.kind == Kind::F32 || (job.expand && !kDots))
        rows_of<F32Loader>(panel, job.stride, panels, x, inputs.ld(), count, w.k, out, lines);
      else if (w.kind == Kind::BF16 || job.expand)
        rows_of<Product<BF16Loader>>(panel, job.stride, panels, x, inputs.ld(), count, w.k, out, lines);
      else if (w.kind == Kind::I8)
        rows_of<Product<I8Loader>>(panel, job.stride, panels, x, inputs.ld(), count, w.k, out, lines);
      else
        rows_of<Product<I4Loader>>(panel, job.stride, panels, x, inputs.ld(), count, w.k, out, lines);
    }
    finish(w, row, count, first, panels, out, added, done);
  }
}

// The rows of the calling thread's products, one after the other.
inline Rows& rows_of_thread() {
  thread_local Rows rows;
  return rows;
}

// Does all jobs on the pool, one after another as far as threads go. `done(row, rows, panel, panels, out)` takes each finished
// piece, out[p][r][16], bias, scale and `added` applied.
template <class Done>
void products(Pool& pool, const std::vector<Job>& jobs, const Rows& inputs, const Done& done, const Added& added = {}) {
  std::vector<std::pair<const Job*, int>> pieces;
  for (const Job& job : jobs)
    for (int piece = 0; piece < job.pieces(); ++piece) pieces.emplace_back(&job, piece);
  pool.run(int(pieces.size()), [&](int i) { multiply(*pieces[i].first, inputs, pieces[i].second, added, done); });
}

// Into how many parts a step's rows are best cut, so that each thread has its own from product to product: as many as there
// are threads, as long as weights that come into a core are worth their way. With fewer rows threads share them all.
inline int parts_of(int rows, int threads) {
  constexpr int kEnoughRows = 128;
  return std::clamp(rows / kEnoughRows, 1, threads);
}

// Multiplies rows with a weight; `unit` panels always come in one piece. See `products`.
template <class Done>
void product(Pool& pool, const Weight& w, const Rows& inputs, int rows, int unit, const Done& done,
             const Added& added = {}) {
  const int parts = std::min(pool.parts(), parts_of(rows, pool.size()));
  auto end_of = [&](int part) { return std::min(rows, (rows * part / parts + kTileRows - 1) / kTileRows * kTileRows); };
  std::vector<Job> jobs;
  for (int p = 0, row = 0; p < parts; row = end_of(++p))
    jobs.emplace_back(std::max(1, pool.size() / parts), w, row, row, end_of(p + 1) - row, unit);
  products(pool, jobs, inputs, done, added);
}

// The same for rows of `a` (row r at a + r * lda).
template <class Done>
void product(Pool& pool, const Weight& w, const float* a, size_t lda, int rows, int unit, const Done& done,
             const Added& added = {}) {
  Rows& inputs = rows_of_thread();
  inputs.take(pool, way_of(w.kind), a, lda, rows, w.k);
  product(pool, w, inputs, rows, unit, done, added);
}

}  // namespace hostler
