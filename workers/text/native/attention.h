// Attention of one step over a paged cache. Above: decoder.cpp. Below: linear.h.
//
// A block holds 16 positions of one layer and key head, keys then values, each laid out as weight panels are: keys as one
// panel of 16 positions (inputs: the head's dimensions), values as head_dim / 16 panels of 16 dimensions (inputs: the
// positions). So scores and sums are the products of linear.h, without a copy or a transposition.
#pragma once
#include "linear.h"

namespace hostler {

constexpr int kBlock = 16;  // positions in a cache block

struct Cache {
  Kind kind = Kind::F32;  // F32 or BF16
  int kv_heads = 0, head_dim = 0;
  size_t blocks = 0;
  uint8_t* data = nullptr;  // [layer][block][kv_head][keys | values]
  size_t element() const { return kind == Kind::BF16 ? 2 : 4; }
  size_t half() const { return size_t(head_dim) * kBlock * element(); }
  uint8_t* block(int layer, int index, int head) const {
    return data + ((size_t(layer) * blocks + index) * kv_heads + head) * 2 * half();
  }
};

// Where element (input, column) of a panel lies.
inline size_t panel_index(Kind kind, int input, int column) {
  return kind == Kind::BF16 ? size_t(input / 2) * kPanel * 2 + column * 2 + input % 2 : size_t(input) * kPanel + column;
}

inline void put(uint8_t* panel, Kind kind, size_t index, float x) {
  if (kind == Kind::BF16) reinterpret_cast<bf16*>(panel)[index] = narrow(x);
  else reinterpret_cast<float*>(panel)[index] = x;
}

// Writes one position's key and value (head_dim floats each). `last`: no later position follows in this step.
inline void write_position(const Cache& cache, uint8_t* block, int slot, const float* key, const float* value,
                           bool last) {
  const size_t panel_elements = size_t(kBlock) * kPanel;
  uint8_t* values = block + cache.half();
  for (int d = 0; d < cache.head_dim; ++d) {
    put(block, cache.kind, panel_index(cache.kind, d, slot), key[d]);
    uint8_t* panel = values + (d / kPanel) * panel_elements * cache.element();
    put(panel, cache.kind, panel_index(cache.kind, slot, d % kPanel), value[d]);
    // Products read positions in pairs: what an earlier owner left in the second half must not be NaN.
    if (last && slot % 2 == 0) put(panel, cache.kind, panel_index(cache.kind, slot + 1, d % kPanel), 0.0f);
  }
}

// Sums p[q][position] * values over blocks first … last for MR queries and NP panels of dimensions.
template <class Loader, int MR, int NP>
void weigh(const Cache& cache, int layer, int head, const int32_t* table, int first, int last, int length, int panel,
           const float* p, size_t ldp, float* out, size_t ldo) {
  vf acc[MR][NP][V] = {};
  const size_t stride = size_t(kBlock) * kPanel * cache.element();
  for (int b = first; b < last; ++b) {
    const uint8_t* values = cache.block(layer, table[b], head) + cache.half() + panel * stride;
    const int positions = std::min(kBlock, (length - b * kBlock + 1) & ~1);
    accumulate<Loader, MR, NP>(acc, values, stride, p + size_t(b - first) * kBlock, ldp, positions, values);
  }
  for (int r = 0; r < MR; ++r)
    for (int q = 0; q < NP; ++q)
      for (int v = 0; v < V; ++v) store(out + r * ldo + (panel + q) * kPanel + v * W, acc[r][q][v]);
}

struct Queries {
  const float* rows[kRows];  // head_dim floats each, already scaled
  float* out[kRows];
  int position[kRows];  // of the query's own token
};

// Turns scores of positions `begin …` (row r sees lo … its own) into probabilities, in place.
inline void softmax(float* scores, int begin, int padded, int lo, int hi) {
  for (int i = begin; i < lo; ++i) scores[i - begin] = 0.0f;
  float peak = -INFINITY;
  for (int i = lo; i < hi; ++i) peak = std::max(peak, scores[i - begin]);
  float* s = scores + (lo - begin);
  const int n = hi - lo;
  float total = 0;
  int i = 0;
  vf totals = {};
  for (; i + W <= n; i += W) {
    const vf e = exp(load(s + i) - peak);
    store(s + i, e);
    totals += e;
  }
  if (i < n) {
    alignas(64) float rest[W];
    for (int j = 0; j < W; ++j) rest[j] = i + j < n ? s[i + j] - peak : -1000.0f;
    const vf e = exp(load(rest));
    store(rest, e);
    for (int j = 0; i + j < n; ++j) s[i + j] = rest[j], total += rest[j];
  }
  total += sum(totals);
  const float inverse = 1.0f / total;
  for (int j = 0; j < n; ++j) s[j] *= inverse;
  for (int j = n; lo + j < begin + padded; ++j) s[j] = 0.0f;
}

template <class Loader, int MR>
void attend(const Cache& cache, int layer, int head, const int32_t* table, const Queries& q, int window) {
  int lowest = 1 << 30, highest_position = 0;
  for (int r = 0; r < MR; ++r) {
    lowest = std::min(lowest, window ? std::max(0, q.position[r] - window + 1) : 0);
    highest_position = std::max(highest_position, q.position[r]);
  }
  const int length = highest_position + 1, first = lowest / kBlock, last = (length + kBlock - 1) / kBlock;
  const int padded = (last - first) * kBlock, begin = first * kBlock;
  thread_local Buffer<float> scratch;
  thread_local size_t scratch_size = 0;
  const size_t needed = size_t(kRows) * padded + kRows * size_t(cache.head_dim);
  if (scratch_size < needed) scratch = allocate<float>(scratch_size = needed * 2);
  float *scores = scratch.get(), *queries = scores + size_t(kRows) * padded;
  for (int r = 0; r < MR; ++r) std::memcpy(queries + r * cache.head_dim, q.rows[r], cache.head_dim * 4);
  alignas(64) float out[MR * kPanel];
  for (int b = first; b < last; ++b) {
    const uint8_t* keys = cache.block(layer, table[b], head);
    Tile<Loader, MR, 1>::run(keys, 0, queries, cache.head_dim, cache.head_dim, out, keys);
    for (int r = 0; r < MR; ++r) std::memcpy(scores + r * padded + (b - first) * kBlock, out + r * kPanel, kPanel * 4);
  }
  for (int r = 0; r < MR; ++r) {
    const int lo = window ? std::max(0, q.position[r] - window + 1) : 0;
    softmax(scores + r * padded, begin, padded, lo, q.position[r] + 1);
  }
  constexpr int NP = wide(MR) < 4 ? wide(MR) : 4;
  const int panels = cache.head_dim / kPanel;
  alignas(64) float sums[MR * 512];
  int p = 0;
  for (; p + NP <= panels; p += NP)
    weigh<Loader, MR, NP>(cache, layer, head, table, first, last, length, p, scores, padded, sums, cache.head_dim);
  for (; p < panels; ++p)
    weigh<Loader, MR, 1>(cache, layer, head, table, first, last, length, p, scores, padded, sums, cache.head_dim);
  for (int r = 0; r < MR; ++r) std::memcpy(q.out[r], sums + r * cache.head_dim, cache.head_dim * 4);
}

template <class Loader>
void attend_rows(const Cache& cache, int layer, int head, const int32_t* table, const Queries& q, int rows, int window) {
  switch (rows) {
    case 1: return attend<Loader, 1>(cache, layer, head, table, q, window);
    case 2: return attend<Loader, 2>(cache, layer, head, table, q, window);
    case 3: return attend<Loader, 3>(cache, layer, head, table, q, window);
    case 4: return attend<Loader, 4>(cache, layer, head, table, q, window);
    case 5: return attend<Loader, 5>(cache, layer, head, table, q, window);
    default: return attend<Loader, 6>(cache, layer, head, table, q, window);
  }
}

}  // namespace hostler
