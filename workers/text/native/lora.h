// Low-rank additions to a layer's products, for the rows of a step whose sequences asked for an adapter.
//
// Above: model.h, decoder.cpp. Below: product.h, pack.h. Before a product, `of` computes what it will add, for all adapters
// of the step in two loops (inputs to ranks, ranks to outputs); `product` adds it before it hands a piece on, so biases,
// activations and residuals see the sum. A step without adapters pays one comparison for each product.
#pragma once
#include <cstring>
#include <utility>
#include <vector>

#include "pack.h"
#include "product.h"

namespace hostler {

// What an adapter adds to some outputs of a packed product: up (down x), to its panels first, first + step, …
struct LowRank {
  Weight down, up;
  int first = 0, step = 1;
};

// Multiplies `rows` rows with one float32 panel into 16 columns of out.
inline void panel_product(const Weight& w, int panel, const float* a, size_t lda, int rows, float* out, size_t ldo) {
  alignas(64) float tile[kRows * kPanel];
  for (int r = 0; r < rows; r += kRows) {
    const int count = std::min(kRows, rows - r);
    rows_of<F32Loader>(w.panel(panel), w.stride, 1, a + r * lda, lda, count, w.k, tile, {w.panel(panel)});
    for (int i = 0; i < count; ++i) std::memcpy(out + (r + i) * ldo, tile + i * kPanel, kPanel * sizeof(float));
  }
}

class Adapters {
 public:
  void add(int adapter, int product, LowRank&& low) {
    if (int(adapters_.size()) <= adapter) adapters_.resize(adapter + 1);
    auto& products = adapters_[adapter];
    if (int(products.size()) <= product) products.resize(product + 1);
    products[product].push_back(std::move(low));
  }

  // No row of the coming step has an adapter.
  void begin() { groups_.clear(); }

  // Says which adapter each of the coming step's rows has, -1 for none.
  template <class Of>
  void begin(int rows, const Of& adapter_of) {
    groups_.clear(), row_.clear();
    slot_.assign(rows, -1);
    for (int a = 0; a < int(adapters_.size()); ++a) {
      Group g{a, int(row_.size()), 0, false};
      for (int r = 0; r < rows; ++r)
        if (adapter_of(r) == a) slot_[r] = int(row_.size()), row_.push_back(r);
      g.rows = int(row_.size()) - g.first;
      if (g.rows == 0) continue;
      g.contiguous = row_.back() - row_[g.first] + 1 == g.rows;
      groups_.push_back(g);
    }
  }

  // What to add to product number `index`, whose weight is `w` and whose input row r is at a + r * lda. Valid until the
  // next call.
  Added of(Pool& pool, int index, const Weight& w, const float* a, size_t lda) {
    if (groups_.empty()) return {};
    parts_.clear();
    const size_t stride = size_t(w.panels) * kPanel;
    size_t inner = 0;
    for (const Group& g : groups_) {
      const auto& products = adapters_[g.adapter];
      if (int(products.size()) <= index) continue;
      for (const LowRank& low : products[index]) {
        parts_.push_back({&low, &g, inner});
        inner += size_t(g.rows) * low.down.panels * kPanel;
      }
    }
    if (parts_.empty()) return {};
    grow(inputs_, inputs_size_, row_.size() * w.k), grow(inner_, inner_size_, inner);
    grow(sums_, sums_size_, row_.size() * stride);
    for (const Group& g : groups_) prepare(pool, g, w, a, lda);
    spread(pool, &LowRank::down, [&](const Part& part, int panel, int row, int rows) {
      const Group& g = *part.group;
      const float* x = g.contiguous ? a + size_t(row_[g.first] + row) * lda : inputs_.get() + size_t(g.first + row) * w.k;
      const size_t ldo = size_t(part.low->down.panels) * kPanel;
      panel_product(part.low->down, panel, x, g.contiguous ? lda : size_t(w.k), rows,
                    inner_.get() + part.inner + row * ldo + panel * kPanel, ldo);
    });
    spread(pool, &LowRank::up, [&](const Part& part, int panel, int row, int rows) {
      const LowRank& low = *part.low;
      const size_t ldi = size_t(low.down.panels) * kPanel;
      panel_product(low.up, panel, inner_.get() + part.inner + row * ldi, ldi, rows,
                    sums_.get() + size_t(part.group->first + row) * stride + size_t(low.first + panel * low.step) * kPanel,
                    stride);
    });
    return {slot_.data(), sums_.get(), stride};
  }

 private:
  static constexpr int kBlockRows = 4 * kRows;  // of one item of work

  // The rows of one adapter: `rows` consecutive slots from `first` on.
  struct Group {
    int adapter, first, rows;
    bool contiguous;  // in the step, too
  };
  struct Part {
    const LowRank* low;
    const Group* group;
    size_t inner;  // where its (rows, ranks) begin
  };
  struct Item {
    int part, panel, row;
  };

  static void grow(Buffer<float>& buffer, size_t& size, size_t needed) {
    if (size < needed) buffer = allocate<float>(needed), size = needed;
  }

  // Gathers a group's inputs unless they lie together, and clears its sums unless the parts fill them.
  void prepare(Pool& pool, const Group& g, const Weight& w, const float* a, size_t lda) {
    int panels = 0;
    for (const Part& part : parts_) panels += part.group == &g ? part.low->up.panels : 0;
    const bool gather = panels > 0 && !g.contiguous, clear = panels < w.panels;
    if (!gather && !clear) return;
    const size_t stride = size_t(w.panels) * kPanel;
    pool.run((g.rows + kBlockRows - 1) / kBlockRows, [&](int block) {
      for (int r = block * kBlockRows; r < std::min(g.rows, (block + 1) * kBlockRows); ++r) {
        const size_t s = size_t(g.first + r);
        if (gather) std::memcpy(inputs_.get() + s * w.k, a + row_[s] * lda, size_t(w.k) * sizeof(float));
        if (clear) std::fill_n(sums_.get() + s * stride, stride, 0.0f);
      }
    });
  }

  // Runs body(part, panel, row, rows) for each panel of every part's matrix and each block of its rows.
  template <class Body>
  void spread(Pool& pool, Weight LowRank::*matrix, const Body& body) {
    items_.clear();
    for (int p = 0; p < int(parts_.size()); ++p)
      for (int panel = 0; panel < (parts_[p].low->*matrix).panels; ++panel)
        for (int row = 0; row < parts_[p].group->rows; row += kBlockRows) items_.push_back({p, panel, row});
    pool.run(int(items_.size()), [&](int i) {
      const Item& item = items_[i];
      const Part& part = parts_[item.part];
      body(part, item.panel, item.row, std::min(kBlockRows, part.group->rows - item.row));
    });
  }

  std::vector<std::vector<std::vector<LowRank>>> adapters_;  // by adapter, by product
  std::vector<Group> groups_;
  std::vector<int32_t> slot_;  // of each row of the step: its place among the adapted, or -1
  std::vector<int32_t> row_;   // the other way round
  std::vector<Part> parts_;
  std::vector<Item> items_;
  Buffer<float> inputs_, inner_, sums_;
  size_t inputs_size_ = 0, inner_size_ = 0, sums_size_ = 0;
};

}  // namespace hostler
