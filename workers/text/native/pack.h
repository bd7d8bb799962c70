// Lays a row-major weight matrix out in panels, quantizing on the way. Above: decoder.cpp. Below: linear.h.
#pragma once
#include "linear.h"

namespace hostler {

// One piece of a weight: `rows` outputs of `k` inputs, row-major float32 or bfloat16.
struct Source {
  const void* data;
  bool is_bf16;
  int rows, k;
  float at(int row, int col) const {
    const size_t i = size_t(row) * k + col;
    return is_bf16 ? widen(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

// Fills one panel from 16 outputs; row(c) gives output c's inputs or nothing (zeros), k inputs each.
template <class Row>
void pack_panel(Kind kind, int k, uint8_t* panel, float* scales, const Row& value) {
  if (kind == Kind::F32) {
    auto* out = reinterpret_cast<float*>(panel);
    for (int i = 0; i < k; ++i)
      for (int c = 0; c < kPanel; ++c) out[size_t(i) * kPanel + c] = value(c, i);
  } else if (kind == Kind::BF16) {
    auto* out = reinterpret_cast<bf16*>(panel);
    for (int i = 0; i < k; ++i)
      for (int c = 0; c < kPanel; ++c) out[size_t(i / 2) * kPanel * 2 + c * 2 + i % 2] = narrow(value(c, i));
  } else if (kind == Kind::I8) {  // symmetric, one scale for each output
    auto* out = reinterpret_cast<int8_t*>(panel);
    for (int c = 0; c < kPanel; ++c) {
      float peak = 0;
      for (int i = 0; i < k; ++i) peak = std::max(peak, std::fabs(value(c, i)));
      const float scale = peak / 127.0f, inverse = peak > 0 ? 127.0f / peak : 0.0f;
      scales[c] = scale;
      for (int i = 0; i < k; ++i)
        out[size_t(i / 4) * kPanel * 4 + c * 4 + i % 4] = int8_t(std::lrintf(value(c, i) * inverse));
    }
  } else {  // 0 … 15 between the least and the greatest of 32 inputs of an output
    for (int g = 0; g < k; g += kGroup) {
      uint8_t* group = panel + size_t(g / kGroup) * I4Loader::kGroupBytes;
      auto* pairs = reinterpret_cast<bf16*>(group);
      uint8_t* bytes = group + kPanel * 4;
      for (int c = 0; c < kPanel; ++c) {
        float least = value(c, g), greatest = least;
        for (int i = g; i < g + kGroup; ++i) {
          least = std::min(least, value(c, i)), greatest = std::max(greatest, value(c, i));
        }
        pairs[2 * c + 1] = narrow(least);
        least = widen(pairs[2 * c + 1]);
        pairs[2 * c] = narrow((greatest - least) / 15.0f);
        const float scale = widen(pairs[2 * c]), inverse = scale > 0 ? 1.0f / scale : 0.0f;
        auto quantized = [&](int i) {
          return std::min(15, std::max(0, int(std::lrintf((value(c, i) - least) * inverse))));
        };
        for (int i = 0; i < kGroup; i += 2)
          bytes[size_t(i / 8) * kPanel * 4 + c * 4 + i % 8 / 2] = uint8_t(quantized(g + i) | quantized(g + i + 1) << 4);
      }
    }
  }
}

// Packs sources stacked one after another; with `interleave`, two sources of equal rows alternate panel by panel.
inline Weight pack(Pool& pool, Kind kind, const Source* sources, int count, bool interleave) {
  Weight w;
  w.kind = kind, w.k = sources[0].k;
  const int first_panels = (sources[0].rows + kPanel - 1) / kPanel;
  for (int s = 0; s < count; ++s) w.n += sources[s].rows;
  w.panels = interleave ? 2 * first_panels : (w.n + kPanel - 1) / kPanel;
  w.stride = panel_stride(kind, w.k);
  w.data = allocate<uint8_t>(size_t(w.panels) * w.stride);
  if (kind == Kind::I8) w.scales = allocate<float>(size_t(w.panels) * kPanel);
  pool.run(w.panels, [&](int p) {
    auto value = [&](int c, int i) -> float {
      if (interleave) {
        const int row = p / 2 * kPanel + c;
        return row < sources[p % 2].rows ? sources[p % 2].at(row, i) : 0.0f;
      }
      int row = p * kPanel + c;
      for (int s = 0; s < count; ++s) {
        if (row < sources[s].rows) return sources[s].at(row, i);
        row -= sources[s].rows;
      }
      return 0.0f;
    };
    float* scales = w.scales ? w.scales.get() + size_t(p) * kPanel : nullptr;
    pack_panel(kind, w.k, w.data.get() + size_t(p) * w.stride, scales, value);
  });
  return w;
}

}  // namespace hostler
