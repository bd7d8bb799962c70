// Lays a row-major weight matrix out in panels, quantizing on the way. Above: decoder.cpp. Below: linear.h, arena.h, pool.h.
//
// A load waits for this: it should take as long as reading the source and writing the panels does. So no loop below
// chooses a source or a format for each element, and those that compute are such that compilers make vectors of them.
#pragma once
#include <type_traits>

#include "arena.h"
#include "linear.h"
#include "pool.h"

namespace hostler {

// One piece of a weight: `rows` outputs of `k` inputs, row-major float32 or bfloat16.
struct Source {
  const void* data;
  bool is_bf16;
  int rows, k;
  const void* row(int r) const { return static_cast<const uint8_t*>(data) + size_t(r) * k * (is_bf16 ? 2 : 4); }
};

inline float widen(float x) { return x; }

// Interleaves 16 rows of `words` 32-bit words: word w of row c goes to out[w * 16 + c].
inline void interleave_words(const void* const* rows, int words, void* out) {
  const uint32_t* from[kPanel];
  for (int c = 0; c < kPanel; ++c) from[c] = static_cast<const uint32_t*>(rows[c]);
  auto* to = static_cast<uint32_t*>(out);
  for (int w = 0; w < words; ++w)
    for (int c = 0; c < kPanel; ++c) std::memcpy(to + size_t(w) * kPanel + c, from[c] + w, 4);
}

// Fills one panel from 16 rows of k inputs each.
template <class T>
void pack_panel(Kind kind, int k, uint8_t* panel, float* scales, const T* const* rows) {
  constexpr bool kNarrow = std::is_same_v<T, bf16>;
  const auto* raw = reinterpret_cast<const void* const*>(rows);
  if (kind == Kind::F32) {
    if (!kNarrow) return interleave_words(raw, k, panel);
    auto* out = reinterpret_cast<float*>(panel);
    for (int i = 0; i < k; ++i)
      for (int c = 0; c < kPanel; ++c) out[size_t(i) * kPanel + c] = widen(rows[c][i]);
  } else if (kind == Kind::BF16) {
    if (kNarrow && k % 2 == 0) return interleave_words(raw, k / 2, panel);
    auto* out = reinterpret_cast<bf16*>(panel);
    for (int i = 0; i < k; ++i)
      for (int c = 0; c < kPanel; ++c) out[size_t(i / 2) * kPanel * 2 + c * 2 + i % 2] = narrow(widen(rows[c][i]));
  } else if (kind == Kind::I8) {  // symmetric, one scale for each output
    thread_local std::vector<int8_t> quantized;
    quantized.resize(size_t(k) + 4);
    int8_t* __restrict values = quantized.data();
    for (int c = 0; c < kPanel; ++c) {
      const T* __restrict row = rows[c];
      const float most = peak(row, k);
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      scales[c] = most / 127.0f;
      for (int i = 0; i < k; ++i) values[i] = int8_t(nearest(widen(row[i]) * inverse));
      uint8_t* to = panel + c * 4;
      int i = 0;
      for (; i + 4 <= k; i += 4, to += kPanel * 4) std::memcpy(to, values + i, 4);
      std::memcpy(to, values + i, size_t(k - i));
    }
  } else {  // 0 … 15 between the least and the greatest of 32 inputs of an output
    for (int g = 0; g < k; g += kGroup) {
      uint8_t* group = panel + size_t(g / kGroup) * I4Loader::kGroupBytes;
      auto* pairs = reinterpret_cast<bf16*>(group);
      uint8_t* bytes = group + kPanel * 4;
      float tile[kGroup][kPanel], least[kPanel], greatest[kPanel], inverse[kPanel];
      for (int c = 0; c < kPanel; ++c)
        for (int i = 0; i < kGroup; ++i) tile[i][c] = widen(rows[c][g + i]);
      for (int c = 0; c < kPanel; ++c) least[c] = greatest[c] = tile[0][c];
      for (int i = 1; i < kGroup; ++i)
        for (int c = 0; c < kPanel; ++c) {
          least[c] = tile[i][c] < least[c] ? tile[i][c] : least[c];
          greatest[c] = tile[i][c] > greatest[c] ? tile[i][c] : greatest[c];
        }
      for (int c = 0; c < kPanel; ++c) {
        pairs[2 * c + 1] = narrow(least[c]);
        least[c] = widen(pairs[2 * c + 1]);
        pairs[2 * c] = narrow((greatest[c] - least[c]) / 15.0f);
        const float scale = widen(pairs[2 * c]);
        inverse[c] = scale > 0 ? 1.0f / scale : 0.0f;
      }
      int levels[kGroup][kPanel];
      for (int i = 0; i < kGroup; ++i)
        for (int c = 0; c < kPanel; ++c)
          levels[i][c] = std::min(15, std::max(0, nearest((tile[i][c] - least[c]) * inverse[c])));
      for (int i = 0; i < kGroup; i += 8)
        for (int c = 0; c < kPanel; ++c) {
          uint32_t word = 0;
          for (int j = 0; j < 8; ++j) word |= uint32_t(levels[i + j][c]) << (4 * j);
          std::memcpy(bytes + size_t(i / 8) * kPanel * 4 + c * 4, &word, 4);
        }
    }
  }
}

// Packs sources stacked one after another; with `interleave`, two sources of equal rows alternate panel by panel.
inline Weight pack(Pool& pool, Arena& arena, Kind kind, const Source* sources, int count, bool interleave) {
  Weight w;
  w.kind = kind, w.k = sources[0].k;
  const bool is_bf16 = sources[0].is_bf16;
  const int first_panels = (sources[0].rows + kPanel - 1) / kPanel;
  for (int s = 0; s < count; ++s) w.n += sources[s].rows;
  w.panels = interleave ? 2 * first_panels : (w.n + kPanel - 1) / kPanel;
  w.stride = panel_stride(kind, w.k);
  w.data = Buffer<uint8_t>(arena.take(size_t(w.panels) * w.stride), Free{false});
  if (kind == Kind::I8) w.scales = allocate<float>(size_t(w.panels) * kPanel);
  const std::vector<uint8_t> zeros(size_t(w.k) * (is_bf16 ? 2 : 4));  // where a panel has more outputs than the sources
  pool.run(w.panels, [&](int p) {
    auto row = [&](int c) -> const void* {
      if (interleave) {
        const int r = p / 2 * kPanel + c;
        return r < sources[p % 2].rows ? sources[p % 2].row(r) : zeros.data();
      }
      int r = p * kPanel + c;
      for (int s = 0; s < count; ++s) {
        if (r < sources[s].rows) return sources[s].row(r);
        r -= sources[s].rows;
      }
      return zeros.data();
    };
    const void* rows[kPanel];
    for (int c = 0; c < kPanel; ++c) rows[c] = row(c);
    float* scales = w.scales ? w.scales.get() + size_t(p) * kPanel : nullptr;
    uint8_t* panel = w.data.get() + size_t(p) * w.stride;
    if (is_bf16) pack_panel(kind, w.k, panel, scales, reinterpret_cast<const bf16* const*>(rows));
    else pack_panel(kind, w.k, panel, scales, reinterpret_cast<const float* const*>(rows));
  });
  return w;
}

}  // namespace hostler
