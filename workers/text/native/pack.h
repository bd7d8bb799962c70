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

inline int quantized4(float x) { return std::min(7, std::max(-8, int(std::lrintf(x)))); }

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
  } else {  // -8 … 7, one scale for each 32 inputs of an output, chosen so that the largest weight is exact
    for (int g = 0; g < k; g += kGroup) {
      uint8_t* group = panel + size_t(g / kGroup) * I4Loader::kGroupBytes;
      auto* scale = reinterpret_cast<float*>(group);
      uint8_t* bytes = group + kPanel * 4;
      for (int c = 0; c < kPanel; ++c) {
        float peak = 0;
        for (int i = g; i < g + kGroup; ++i)
          if (std::fabs(value(c, i)) > std::fabs(peak)) peak = value(c, i);
        scale[c] = peak / -8.0f;
        const float inverse = peak != 0 ? -8.0f / peak : 0.0f;
        for (int i = 0; i < kGroup; i += 2) {
          const int low = quantized4(value(c, g + i) * inverse), high = quantized4(value(c, g + i + 1) * inverse);
          bytes[size_t(i / 8) * kPanel * 4 + c * 4 + i % 8 / 2] = uint8_t((low & 15) | (high & 15) << 4);
        }
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
