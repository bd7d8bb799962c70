// What happens to rows between their products. Above: decoder.cpp. Below: pool.h, vec.h.
#pragma once
#include "pool.h"
#include "vec.h"

namespace hostler {

inline void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  vf squares = {};
  for (int i = 0; i < n; i += W) squares += load(x + i) * load(x + i);
  const float scale = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
  for (int i = 0; i < n; i += W) store(out + i, load(x + i) * scale * load(weight + i));
}

constexpr int kRowsPerChunk = 4;

// Runs body(row) for each row: here when they are few, else on the pool in blocks.
template <class Body>
void each_row(Pool& pool, int rows, const Body& body) {
  if (rows <= kRowsPerChunk) {
    for (int r = 0; r < rows; ++r) body(r);
    return;
  }
  pool.run((rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int chunk) {
    for (int r = chunk * kRowsPerChunk; r < std::min(rows, (chunk + 1) * kRowsPerChunk); ++r) body(r);
  });
}

// Half-split rotation (NeoX): the first rotary_dim / 2 dimensions pair with the next ones.
inline void rotate(float* head, const float* cosines, const float* sines, int half) {
  int i = 0;
  for (; i + W <= half; i += W) {
    const vf a = load(head + i), b = load(head + half + i), c = load(cosines + i), s = load(sines + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cosines[i] - b * sines[i], head[half + i] = b * cosines[i] + a * sines[i];
  }
}

// Puts a piece of a product into rows of `width`.
inline void put(int row, int count, int panel, int panels, const float* out, float* to, size_t width) {
  for (int p = 0; p < panels; ++p)
    for (int r = 0; r < count; ++r)
      std::memcpy(to + size_t(row + r) * width + (panel + p) * kPanel, out + (p * count + r) * kPanel, 64);
}

// What a gated MLP makes of a piece of its first product, gate and up panel by panel: take(row, first input, 16 of them).
template <class Take>
void gate(bool gelu, int row, int count, int panel, int panels, const float* out, const Take& take) {
  for (int p = 0; p < panels; p += 2)
    for (int r = 0; r < count; ++r) {
      alignas(64) float made[kPanel];
      const float *g = out + (p * count + r) * kPanel, *u = g + count * kPanel;
      for (int v = 0; v < kPanel; v += W)
        store(made + v, (gelu ? gelu_tanh(load(g + v)) : silu(load(g + v))) * load(u + v));
      take(row + r, (panel + p) / 2 * kPanel, made);
    }
}

}  // namespace hostler
