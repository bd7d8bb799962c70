// Attention of one step over a paged cache. Above: decoder.cpp. Below: linear.h, amx.h.
//
// A block holds 16 positions of all layers and key heads. Of each it has keys, then values, each laid out as weight panels are: keys as one
// panel of 16 positions (inputs: the head's dimensions), values as head_dim / 16 panels of 16 dimensions (inputs: the
// positions). So scores and sums are the products of linear.h, without a copy or a transposition.
#pragma once
#include "amx.h"
#include "linear.h"

namespace hostler {

constexpr int kBlock = 16;  // positions in a cache block

struct Cache {
  Kind kind = Kind::F32;  // F32 or BF16
  int layers = 0, kv_heads = 0, head_dim = 0;
  uint8_t* data = nullptr;  // [block][layer][kv_head][keys | values]
  size_t element() const { return kind == Kind::BF16 ? 2 : 4; }
  size_t half() const { return size_t(head_dim) * kBlock * element(); }
  size_t whole() const { return size_t(layers) * kv_heads * 2 * half(); }  // bytes of a block
  uint8_t* block(int layer, int index, int head) const {
    return data + size_t(index) * whole() + (size_t(layer) * kv_heads + head) * 2 * half();
  }
};

// Writes one position's key and value (head_dim floats each). `last`: no later position follows in this step.
inline void write_position(const Cache& cache, uint8_t* block, int slot, const float* key, const float* value,
                           bool last) {
  const int dim = cache.head_dim;
  uint8_t* values = block + cache.half();
  // Products read positions in pairs: what an earlier owner left in the second half must not be NaN.
  const bool clears = last && slot % 2 == 0;
  if (cache.kind != Kind::BF16) {
    auto *keys = reinterpret_cast<float*>(block), *sums = reinterpret_cast<float*>(values) + slot * kPanel;
    for (int d = 0; d < dim; ++d) keys[d * kBlock + slot] = key[d];
    for (int p = 0; p < dim; p += kPanel, sums += kBlock * kPanel) {
      std::memcpy(sums, value + p, kPanel * 4);
      if (clears) std::memset(sums + kPanel, 0, kPanel * 4);
    }
    return;
  }
  // Inputs stand in pairs: of keys two dimensions, of values two positions, which two threads may write at once.
  alignas(64) bf16 rounded[512];
  narrow_all(key, dim, rounded);
  for (int d = 0; d < dim; d += 2) std::memcpy(block + d * kBlock * 2 + slot * 4, rounded + d, 4);
  narrow_all(value, dim, rounded);
  auto* sums = reinterpret_cast<bf16*>(values) + slot / 2 * kPanel * 2;
  for (int p = 0; p < dim; p += kPanel, sums += kBlock * kPanel) {
#if defined(__AVX512BF16__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded + p)));
    if (slot % 2) _mm512_mask_storeu_epi16(sums, 0xaaaaaaaau, _mm512_slli_epi32(wide, 16));
    else _mm512_mask_storeu_epi16(sums, clears ? 0xffffffffu : 0x55555555u, wide);
#else
    for (int d = 0; d < kPanel; ++d) sums[d * 2 + slot % 2] = rounded[p + d];
    for (int d = 0; clears && d < kPanel; ++d) sums[d * 2 + 1] = 0;
#endif
  }
}


// How many inputs stand in four bytes of what a loader's products take.
template <class Loader>
constexpr int kInputs = kPaired<Loader> ? 2 : 1;  // queries and probabilities are rounded as keys and values are

// Sums p[q][position] * values over blocks first … last for MR queries and NP panels of dimensions.
template <class Loader, int MR, int NP>
void weigh(const Cache& cache, int layer, int head, const int32_t* table, int first, int last, int length, int panel,
           const float* p, size_t ldp, float* out, size_t ldo) {
  vf acc[MR][NP][V] = {};
  const size_t stride = size_t(kBlock) * kPanel * cache.element();
  for (int b = first; b < last; ++b) {
    const uint8_t* values = cache.block(layer, table[b], head) + cache.half() + panel * stride;
    const int positions = std::min(kBlock, (length - b * kBlock + 1) & ~1);
    accumulate<Loader, MR, NP>(acc, values, stride, p + (b - first) * (kBlock / kInputs<Loader>), ldp, positions, {values});
  }
  for (int r = 0; r < MR; ++r)
    for (int q = 0; q < NP; ++q)
      for (int v = 0; v < V; ++v) store(out + r * ldo + (panel + q) * kPanel + v * W, acc[r][q][v]);
}

constexpr int kQueries = 16;  // most at once

struct Queries {
  const float* rows[kQueries];  // head_dim floats each, already scaled
  float* out[kQueries];
  int position[kQueries];  // of the query's own token
};

// The blocks that queries look at.
struct Span {
  int first, last, length;  // blocks first … last; positions up to the last query's
  Span(const Queries& q, int rows, int window) {
    int lowest = 1 << 30, highest = 0;
    for (int r = 0; r < rows; ++r) {
      lowest = std::min(lowest, window ? std::max(0, q.position[r] - window + 1) : 0);
      highest = std::max(highest, q.position[r]);
    }
    length = highest + 1, first = lowest / kBlock, last = (length + kBlock - 1) / kBlock;
  }
  int begin() const { return first * kBlock; }
  int padded() const { return (last - first) * kBlock; }
};

// Memory of the calling thread, `floats` floats at least.
inline float* scratch(size_t floats) {
  thread_local Buffer<float> memory;
  thread_local size_t size = 0;
  if (size < floats) memory = allocate<float>(size = floats * 2);
  return memory.get();
}

// Turns a row's scores of positions lo … hi - 1 into e^(score - greatest) and those of the other `padded` ones, whole
// blocks, into 0, all in place; returns their sum.
inline float exponentiate(float* scores, int padded, int lo, int hi) {
  std::fill(scores, scores + lo, -INFINITY);
  std::fill(scores + hi, scores + padded, -INFINITY);
  vf peaks = splat(-INFINITY);
  for (int i = 0; i < padded; i += W) {
    const vf x = load(scores + i);
    peaks = pick(x > peaks, x, peaks);
  }
  const float peak = highest(peaks);
  vf totals = {};
  for (int i = 0; i < padded; i += W) {
    const vf e = exp_below(load(scores + i) - peak);
    store(scores + i, e);
    totals += e;
  }
  return sum(totals);
}

template <class Loader, int MR>
void attend(const Cache& cache, int layer, int head, const int32_t* table, const Queries& q, int window) {
  const Span span(q, MR, window);
  const int first = span.first, last = span.last, length = span.length, padded = span.padded(), begin = span.begin();
  float* scores = scratch(size_t(kRows) * padded + kRows * size_t(cache.head_dim));
  float* queries = scores + size_t(kRows) * padded;
  constexpr bool rounds = kInputs<Loader> == 2;
  const size_t ldq = cache.head_dim / kInputs<Loader>;
  for (int r = 0; r < MR; ++r) {
    if (rounds) narrow_all(q.rows[r], cache.head_dim, reinterpret_cast<bf16*>(queries + r * ldq));
    else std::memcpy(queries + r * ldq, q.rows[r], cache.head_dim * 4);
  }
  constexpr int NB = wide(MR) < 2 ? 1 : 2;  // blocks at once; as panels they are as far apart as they happen to lie
  alignas(64) float out[NB * MR * kPanel];
  auto score = [&](auto together, int b) {
    constexpr int blocks = decltype(together)::value;
    const uint8_t* keys = cache.block(layer, table[b], head);
    const size_t stride = size_t(cache.block(layer, table[b + blocks - 1], head) - keys);
    Tile<Loader, MR, blocks>::run(keys, stride, queries, ldq, cache.head_dim, out, {keys});
    for (int p = 0; p < blocks; ++p)
      for (int r = 0; r < MR; ++r)
        std::memcpy(scores + r * padded + (b + p - first) * kBlock, out + (p * MR + r) * kPanel, kPanel * 4);
  };
  int block = first;
  for (; block + NB <= last; block += NB) score(std::integral_constant<int, NB>{}, block);
  for (; block < last; ++block) score(std::integral_constant<int, 1>{}, block);
  float inverse[MR];
  for (int r = 0; r < MR; ++r) {
    const int lo = window ? std::max(0, q.position[r] - window + 1) : 0;
    float* row = scores + r * padded;
    inverse[r] = 1.0f / exponentiate(row, padded, lo - begin, q.position[r] + 1 - begin);
    if (rounds) narrow_all(row, padded, reinterpret_cast<bf16*>(row));
  }
  constexpr int NP = wide(MR) < 4 ? wide(MR) : 4;
  const int panels = cache.head_dim / kPanel;
  alignas(64) float sums[MR * 512];
  int p = 0;
  for (; p + NP <= panels; p += NP)
    weigh<Loader, MR, NP>(cache, layer, head, table, first, last, length, p, scores, padded, sums, cache.head_dim);
  for (; p < panels; ++p)
    weigh<Loader, MR, 1>(cache, layer, head, table, first, last, length, p, scores, padded, sums, cache.head_dim);
  for (int r = 0; r < MR; ++r)
    for (int d = 0; d < cache.head_dim; d += W) store(q.out[r] + d, load(sums + r * cache.head_dim + d) * inverse[r]);
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

#if defined(HOSTLER_AMX)
// The same in tiles: up to 16 queries, keys and values as they lie in the cache.
inline void attend_tiles(const Cache& cache, int layer, int head, const int32_t* table, const Queries& q, int rows,
                         int window) {
  const Span span(q, rows, window);
  const int dim = cache.head_dim, width = (dim + 31) / 32 * 32, padded = span.padded(), panels = dim / kPanel;
  const size_t ldp = size_t(padded) + 32;  // not a multiple of 4 KB, where rows would drive each other out of the cache
  const size_t part = kPanel * kBlock * sizeof(bf16);
  float* scores = scratch(kQueries * (size_t(padded) + ldp / 2 + width / 2 + dim) + panels * part / sizeof(float));
  auto* weights = reinterpret_cast<bf16*>(scores + size_t(kQueries) * padded);
  auto* queries = reinterpret_cast<uint8_t*>(weights + kQueries * ldp);
  float* sums = reinterpret_cast<float*>(queries + size_t(kQueries) * width * sizeof(bf16));
  auto* end = reinterpret_cast<uint8_t*>(sums + size_t(kQueries) * dim);
  for (int r = 0; r < rows; ++r) amx::lay_out(q.rows[r], dim, queries + r * amx::kLine);
  amx::Tiles registers;
  registers.shape(rows);
  for (int b = span.first; b < span.last;) {
    const uint8_t* keys[4];
    const int together = span.last - b >= 4 ? 4 : 1;
    for (int i = 0; i < together; ++i) keys[i] = cache.block(layer, table[b + i], head);
    float* to = scores + (b - span.first) * kBlock;
    if (together == 4) amx::multiply_pairs<4>(keys, amx::Lines(cache.half()), queries, to, kBlock, padded);
    else amx::multiply_pairs<1>(keys, amx::Lines(cache.half()), queries, to, kBlock, padded);
    b += together;
  }
  float inverse[kQueries];
  for (int r = 0; r < rows; ++r) {
    const int lo = window ? std::max(0, q.position[r] - window + 1) : 0;
    float* of_row = scores + size_t(r) * padded;
    inverse[r] = 1.0f / exponentiate(of_row, padded, lo - span.begin(), q.position[r] + 1 - span.begin());
    narrow_all(of_row, padded, weights + r * ldp);
  }
  // Of the last block only what was written: what an earlier owner left behind may be NaN.
  const uint8_t* last = cache.block(layer, table[span.last - 1], head) + cache.half();
  if (const int lines = (span.length - (span.last - 1) * kBlock + 1) / 2; lines < kBlock / 2) {
    std::memset(end, 0, panels * part);
    for (int p = 0; p < panels; ++p) std::memcpy(end + p * part, last + p * part, lines * amx::kLine);
    last = end;
  }
  registers.shape(rows, kBlock / 2);
  for (int p = 0; p < panels;) {
    auto memory = [&](int i) {
      const int b = span.first + i;
      return (b + 1 == span.last ? last : cache.block(layer, table[b], head) + cache.half()) + p * part;
    };
    const int blocks = span.last - span.first, together = panels - p >= 4 ? 4 : panels - p >= 2 ? 2 : 1;
    float* to = sums + p * kPanel;
    if (together == 4) amx::multiply_blocks<4>(blocks, memory, weights, ldp * sizeof(bf16), to, dim);
    else if (together == 2) amx::multiply_blocks<2>(blocks, memory, weights, ldp * sizeof(bf16), to, dim);
    else amx::multiply_blocks<1>(blocks, memory, weights, ldp * sizeof(bf16), to, dim);
    p += together;
  }
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < dim; d += W) store(q.out[r] + d, load(sums + size_t(r) * dim + d) * inverse[r]);
}
#endif

// How many queries to attend at once.
inline int queries_at_once(const Cache& cache) {
  return cache.kind == Kind::BF16 && amx::usable() ? kQueries : kRows;
}

inline void attend(const Cache& cache, int layer, int head, const int32_t* table, const Queries& q, int rows, int window) {
#if defined(HOSTLER_AMX)
  if (queries_at_once(cache) == kQueries) return attend_tiles(cache, layer, head, table, q, rows, window);
#endif
  if (cache.kind == Kind::BF16) return attend_rows<Product<BF16Loader>>(cache, layer, head, table, q, rows, window);
  return attend_rows<F32Loader>(cache, layer, head, table, q, rows, window);
}

}  // namespace hostler
