// Products by Intel's matrix instructions (AMX). Above: product.h, attention.h. Below: vec.h.
//
// A tile is a register of 16 rows of 64 bytes. One instruction adds to 16 x 16 sums the products of 16 rows of 32 bfloat16
// inputs (or 64 bytes) with as many inputs of 16 outputs. A panel's memory is already a sequence of such second operands;
// rows are cut into first operands by whoever calls. A row is computed alike whatever its neighbours are.
#pragma once
#include <cstddef>

#include "vec.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#define HOSTLER_AMX 1
#endif

namespace hostler::amx {

constexpr int kRows = 16;                     // of a tile
constexpr int kLine = 64;                     // bytes of a tile's row
constexpr size_t kTile = size_t(kRows) * kLine;

// Rounds one row of k inputs to bfloat16, 32 to a tile, in the tiles' line `to`; what is left of the last one is zero.
inline void lay_out(const float* row, int k, uint8_t* to) {
  int i = 0;
  for (; i + 32 <= k; i += 32, to += kTile) narrow_all(row + i, 32, reinterpret_cast<bf16*>(to));
  if (i == k) return;
  std::memset(to, 0, kLine);
  narrow_all(row + i, k - i, reinterpret_cast<bf16*>(to));
}

// Which lines of panels of `bytes` bytes are multiplied, from byte `begin` to `end`. Those before `begin` were, and their
// sums are where these go.
struct Lines {
  size_t bytes, begin, end;
  explicit Lines(size_t all) : bytes(all), begin(0), end(all) {}
  Lines(size_t all, size_t from, size_t most) : bytes(all), begin(from), end(from + most < all ? from + most : all) {}
};

// What to bring into a core's second cache on the way: so many lines from `from` on for each tile of inputs.
struct Fetch {
  const uint8_t* from = nullptr;
  size_t lines = 0;
  void some() {
    for (size_t i = 0; i < lines; ++i, from += kLine) __builtin_prefetch(from, 0, 2);
  }
};

#if defined(HOSTLER_AMX)

// Whether this process may use tiles. Linux wants to be asked once, since they make a thread's state 8 KB larger.
inline bool usable() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// Compilers do not know what the instructions for tiles read: before one of them, everything has to be written.
inline void settle(const void* what = nullptr) { asm volatile("" ::"r"(what) : "memory"); }

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The calling thread's tiles while this lives: 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 weights.
class Tiles {
 public:
  ~Tiles() {
    if (rows_) _tile_release();
  }
  // For products of so many rows, 16 at most, with `depth` lines of a weight at once.
  void shape(int rows, int depth = kRows) {
    if (rows != rows_ || depth != depth_) load(rows, rows, depth);
  }
  // For products of 17 to 32 rows: tiles 2, 3 and 5 belong to those beyond 16.
  void shape_two(int rows) {
    if (rows != rows_) load(kRows, rows - kRows, kRows);
    rows_ = rows;
  }

 private:
  void load(int rows, int more, int depth) {
    Configuration c;
    const int rows_of[8] = {rows, rows, more, more, rows, more, depth, depth};
    for (int t = 0; t < 8; ++t) c.bytes[t] = kLine, c.rows[t] = uint8_t(rows_of[t]);
    c.bytes[4] = c.bytes[5] = uint16_t(depth * 4);
    settle(&c);
    _tile_loadconfig(&c);
    rows_ = rows, depth_ = depth;
  }
  int rows_ = 0, depth_ = 0;
};

// A panel's tiles one after another; the last, where inputs run out, filled up with zeros.
class Panel {
 public:
  // `bytes` of a panel: all of its lines.
  Panel(const uint8_t* panel, size_t bytes) : panel_(panel), whole_(bytes / kTile * kTile) {
    if (whole_ == bytes) return;
    std::memset(rest_, 0, kTile);
    std::memcpy(rest_, panel + whole_, bytes - whole_);
  }
  const uint8_t* at(size_t offset) const { return offset < whole_ ? panel_ + offset : rest_; }

 private:
  const uint8_t* panel_;
  size_t whole_;
  alignas(64) uint8_t rest_[kTile];
};

template <int NP>
void store_sums(float* out, size_t apart, size_t ldo) {
  _tile_stored(0, out, ldo * sizeof(float));
  if constexpr (NP > 1) _tile_stored(1, out + apart, ldo * sizeof(float));
  if constexpr (NP > 2) _tile_stored(2, out + 2 * apart, ldo * sizeof(float));
  if constexpr (NP > 3) _tile_stored(3, out + 3 * apart, ldo * sizeof(float));
}

// Adds to NP sums the products of one tile of inputs, whose lines are `lda` bytes apart, with a tile of each panel.
template <int NP>
inline __attribute__((always_inline)) void add(const void* inputs, size_t lda, const uint8_t* p0, const uint8_t* p1,
                                               const uint8_t* p2, const uint8_t* p3) {
  _tile_loadd(4, inputs, lda);
  _tile_loadd(6, p0, kLine);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (NP > 1) {
    _tile_loadd(7, p1, kLine);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (NP > 2) {
    _tile_loadd(6, p2, kLine);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (NP > 3) {
    _tile_loadd(7, p3, kLine);
    _tile_dpbf16ps(3, 4, 7);
  }
}

inline __attribute__((always_inline)) void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Rows of bfloat16 (tiles of 32 inputs, one after another) times NP panels, 1 to 4. Row r of panel p goes to
// out + p * apart + r * ldo.
template <int NP>
void multiply_pairs(const uint8_t* const* panels, const Lines& lines, const uint8_t* inputs, float* out, size_t apart,
                    size_t ldo) {
  const Panel p0(panels[0], lines.bytes), p1(panels[NP > 1 ? 1 : 0], lines.bytes),
      p2(panels[NP > 2 ? 2 : 0], lines.bytes), p3(panels[NP > 3 ? 3 : 0], lines.bytes);
  settle();
  clear_sums();
  if (lines.begin) {
    _tile_loadd(0, out, ldo * sizeof(float));
    if constexpr (NP > 1) _tile_loadd(1, out + apart, ldo * sizeof(float));
    if constexpr (NP > 2) _tile_loadd(2, out + 2 * apart, ldo * sizeof(float));
    if constexpr (NP > 3) _tile_loadd(3, out + 3 * apart, ldo * sizeof(float));
  }
  for (size_t at = lines.begin; at < lines.end; at += kTile)
    add<NP>(inputs + at, kLine, p0.at(at), p1.at(at), p2.at(at), p3.at(at));
  store_sums<NP>(out, apart, ldo);
}

// 17 to 32 rows times one or two panels: every tile that is loaded serves twice. The rows beyond 16 begin at `more`.
// Rows come past the first cache, which two panels fill, for all rows that follow.
template <int NP>
void multiply_two(const uint8_t* const* panels, const Lines& lines, const uint8_t* inputs, const uint8_t* more, float* out,
                  size_t apart, Fetch fetch) {
  constexpr size_t kLater = size_t(kRows) * kPanel;
  const Panel p0(panels[0], lines.bytes), p1(panels[NP - 1], lines.bytes);
  settle();
  clear_sums();
  if (lines.begin) {
    _tile_loadd(0, out, kLine);
    _tile_loadd(2, out + kLater, kLine);
    if constexpr (NP > 1) {
      _tile_loadd(1, out + apart, kLine);
      _tile_loadd(3, out + apart + kLater, kLine);
    }
  }
  for (size_t at = lines.begin; at < lines.end; at += kTile) {
    fetch.some();
    _tile_stream_loadd(4, inputs + at, kLine);
    _tile_loadd(6, p0.at(at), kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(5, more + at, kLine);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (NP > 1) {
      _tile_loadd(7, p1.at(at), kLine);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, kLine);
  _tile_stored(2, out + kLater, kLine);
  if constexpr (NP > 1) {
    _tile_stored(1, out + apart, kLine);
    _tile_stored(3, out + apart + kLater, kLine);
  }
}

// multiply_pairs with a panel's inputs spread over `count` blocks of 16, each block NP panels of 8 lines, beginning at
// memory(i). The rows of `inputs` are `lda` bytes apart.
template <int NP, class Memory>
void multiply_blocks(int count, const Memory& memory, const bf16* inputs, size_t lda, float* out, size_t ldo) {
  constexpr size_t kPart = kTile / 2;
  settle();
  clear_sums();
  for (int i = 0; i < count; ++i) {
    const uint8_t* block = memory(i);
    add<NP>(inputs + i * kRows, lda, block, block + kPart, block + 2 * kPart, block + 3 * kPart);
  }
  store_sums<NP>(out, kPanel, ldo);
}

// multiply_pairs for weights of 8 bits and inputs of 16, whose tiles alternate: high halves (signed), low halves (not). Sums of
// integers are exact; `unit` is what one of a row's inputs is worth.
template <int NP>
void multiply_bytes(const uint8_t* panel, size_t stride, const uint8_t* inputs, const float* unit, int rows, float* out,
                    size_t apart) {
  const Panel p0(panel, stride), p1(panel + (NP > 1) * stride, stride);
  settle();
  clear_sums();
  for (size_t at = 0; at < stride; at += kTile) {
    _tile_loadd(4, inputs + 2 * at, kLine);
    _tile_loadd(5, inputs + 2 * at + kTile, kLine);
    _tile_loadd(6, p0.at(at), kLine);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
    if constexpr (NP > 1) {
      _tile_loadd(7, p1.at(at), kLine);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  alignas(64) int32_t sums[2 * NP][kRows * kPanel];
  _tile_stored(0, sums[0], kLine);
  _tile_stored(1, sums[1], kLine);
  if constexpr (NP > 1) {
    _tile_stored(2, sums[2], kLine);
    _tile_stored(3, sums[3], kLine);
  }
  for (int p = 0; p < NP; ++p)
    for (int r = 0; r < rows; ++r) {
      const vi high = *reinterpret_cast<const vi*>(sums[2 * p] + r * kPanel);
      const vi low = *reinterpret_cast<const vi*>(sums[2 * p + 1] + r * kPanel);
      const vf sum = __builtin_convertvector(high, vf) * 256.0f + __builtin_convertvector(low, vf);
      store(out + p * apart + r * kPanel, sum * unit[r]);
    }
}

// However many panels, `stride` bytes apart, and up to 32 rows, those beyond 16 at `more`: out[p][r][16].
inline void pairs(Tiles& tiles, const uint8_t* panel, int panels, const Lines& lines, const uint8_t* inputs,
                  const uint8_t* more, int rows, float* out, Fetch fetch = {}) {
  const size_t apart = size_t(rows) * kPanel, stride = lines.bytes;
  const int most = rows > kRows ? 2 : 4;
  if (rows > kRows) tiles.shape_two(rows);
  else tiles.shape(rows);
  while (panels > 0) {
    const uint8_t* each[4] = {panel, panel + stride, panel + 2 * stride, panel + 3 * stride};
    const int together = panels >= most ? most : panels >= 2 ? 2 : 1;
    if (rows > kRows && together == 2) multiply_two<2>(each, lines, inputs, more, out, apart, fetch);
    else if (rows > kRows) multiply_two<1>(each, lines, inputs, more, out, apart, fetch);
    else if (together == 4) multiply_pairs<4>(each, lines, inputs, out, apart, kPanel);
    else if (together == 2) multiply_pairs<2>(each, lines, inputs, out, apart, kPanel);
    else multiply_pairs<1>(each, lines, inputs, out, apart, kPanel);
    panels -= together, panel += together * stride, out += together * apart;
  }
}

// The same for weights of 8 bits; see multiply_bytes.
inline void bytes(Tiles& tiles, const uint8_t* panel, size_t stride, int panels, const uint8_t* inputs,
                  const uint8_t* more, const float* unit, int rows, float* out) {
  for (int row = 0; row < rows; row += kRows) {
    const int count = rows - row < kRows ? rows - row : kRows;
    tiles.shape(count);
    for (int p = 0; p < panels; p += 2) {
      float* to = out + (size_t(p) * rows + row) * kPanel;
      const uint8_t *first = panel + p * stride, *rows_of = row ? more : inputs;
      if (p + 1 < panels) multiply_bytes<2>(first, stride, rows_of, unit + row, count, to, size_t(rows) * kPanel);
      else multiply_bytes<1>(first, stride, rows_of, unit + row, count, to, size_t(rows) * kPanel);
    }
  }
}

#else

constexpr bool usable() { return false; }
struct Tiles {};
inline void pairs(Tiles&, const uint8_t*, int, const Lines&, const uint8_t*, const uint8_t*, int, float*, Fetch = {}) {}
inline void bytes(Tiles&, const uint8_t*, size_t, int, const uint8_t*, const uint8_t*, const float*, int, float*) {}

#endif

}  // namespace hostler::amx
