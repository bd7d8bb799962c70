// Intel's instructions for tiles as plain C++, so that kernels for them are tested on any processor: `-include` this and
// define what a compiler defines where they exist. By Intel's Software Developer's Manual, volume 2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;  // of a row
  uint8_t data[16][64] = {};
};
inline thread_local Tile tiles[8];

inline void load_configuration(const void* memory) {
  const auto* c = static_cast<const uint8_t*>(memory);
  if (c[0] != 1) std::abort();
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * t, 2);
    if (bytes > 64 || c[48 + t] > 16) std::abort();
    tiles[t] = Tile{c[48 + t], bytes};
  }
}

inline void release() {
  for (Tile& tile : tiles) tile = Tile{};
}

inline void zero(int t) {
  if (tiles[t].rows == 0) std::abort();  // not configured
  std::memset(tiles[t].data, 0, sizeof tiles[t].data);
}

inline void load(int t, const void* memory, size_t stride) {
  if (tiles[t].rows == 0) std::abort();
  zero(t);
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(tiles[t].data[r], static_cast<const uint8_t*>(memory) + r * stride, tiles[t].bytes);
}

inline void store(int t, void* memory, size_t stride) {
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(static_cast<uint8_t*>(memory) + r * stride, tiles[t].data[r], tiles[t].bytes);
}

// sums[m][n] += for all lines k: what `products` says of four bytes of row m and of four bytes of line k.
template <class Sum, class Products>
void multiply(int sums, int rows, int lines, const Products& products) {
  const Tile &a = tiles[rows], &b = tiles[lines];
  Tile& c = tiles[sums];
  if (a.rows != c.rows || a.bytes != b.rows * 4 || b.bytes != c.bytes) std::abort();
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      Sum total;
      std::memcpy(&total, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k) total += products(a.data[m] + 4 * k, b.data[k] + 4 * n);
      std::memcpy(c.data[m] + 4 * n, &total, 4);
    }
}

inline float pairs(const uint8_t* a, const uint8_t* b) {
  auto wide = [](const uint8_t* from) {
    const uint32_t bits = uint32_t(from[0]) << 16 | uint32_t(from[1]) << 24;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  return wide(a) * wide(b) + wide(a + 2) * wide(b + 2);
}

template <class Row>
int32_t bytes(const uint8_t* a, const uint8_t* b) {
  int32_t total = 0;
  for (int i = 0; i < 4; ++i) total += int32_t(Row(a[i])) * int32_t(int8_t(b[i]));
  return total;
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_stream_loadd
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_loadconfig(memory) emulated::load_configuration(memory)
#define _tile_release() emulated::release()
#define _tile_loadd(t, memory, stride) emulated::load(t, memory, stride)
#define _tile_stream_loadd(t, memory, stride) emulated::load(t, memory, stride)
#define _tile_stored(t, memory, stride) emulated::store(t, memory, stride)
#define _tile_zero(t) emulated::zero(t)
#define _tile_dpbf16ps(sums, rows, lines) emulated::multiply<float>(sums, rows, lines, emulated::pairs)
#define _tile_dpbssd(sums, rows, lines) emulated::multiply<int32_t>(sums, rows, lines, emulated::bytes<int8_t>)
#define _tile_dpbusd(sums, rows, lines) emulated::multiply<int32_t>(sums, rows, lines, emulated::bytes<uint8_t>)

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

// Nobody's permission is needed.
#include <unistd.h>
#define syscall(...) 0L
#include "amx.h"
#undef syscall
