// Packed weights, and a tile of a few rows times a few of their panels. Above: product.h, attention.h, lora.h. Below: vec.h.
//
// A weight matrix (N outputs, K inputs) is cut into panels of 16 outputs; within a panel all outputs of one input stand
// together, so a product streams the panel once, contiguously. Rows go in tiles of up to 6 whose sums stay in registers.
// Activations and sums are float32; weights widen as they are read:
//   F32   K x 16 floats
//   BF16  K/2 x 16 x 2: two inputs side by side, so that a shift or a mask widens them (or one dot-product instruction)
//   I8    K/4 x 16 x 4 bytes, one float32 scale for each output
//   I4    for each 32 inputs: 16 bfloat16 pairs (scale, least weight), then 4 x 16 x 8 half bytes
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "vec.h"

namespace hostler {

enum class Kind : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };
constexpr int kGroup = 32;        // inputs that share an I4 scale
constexpr int kRows = 6;          // most rows in a tile
#if defined(__AVX512BF16__)
constexpr bool kDots = true;      // one instruction multiplies two pairs of bfloat16 and adds both products
#else
constexpr bool kDots = false;
#endif

struct Free {
  bool owned = true;  // else somebody else frees it
  void operator()(void* p) const {
    if (owned) std::free(p);
  }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(size_t count) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<size_t>(count * sizeof(T), 64)) != 0) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

struct Weight {
  Kind kind = Kind::F32;
  int n = 0, k = 0, panels = 0;
  size_t stride = 0;  // bytes of a panel
  Buffer<uint8_t> data;
  Buffer<float> scales;  // I8: (panels, 16)
  Buffer<float> bias;    // (panels, 16), or none
  const uint8_t* panel(int p) const { return data.get() + size_t(p) * stride; }
};

inline size_t panel_stride(Kind kind, int k) {
  switch (kind) {
    case Kind::F32: return size_t(k) * kPanel * 4;
    case Kind::BF16: return size_t(k) * kPanel * 2;
    case Kind::I8: return size_t(k) * kPanel;
    default: return size_t((k + kGroup - 1) / kGroup) * (kPanel * 4 + kGroup / 2 * kPanel);
  }
}

// A loader reads a panel in steps of kStep inputs; at(panel, k, j, v) gives vector v of input k + j, widened to float32.
struct F32Loader {
  static constexpr int kStep = 2;
  static vf at(const uint8_t* panel, int k, int j, int v) {
    return load(reinterpret_cast<const float*>(panel) + size_t(k + j) * kPanel + v * W);
  }
};
struct BF16Loader {
  static constexpr int kStep = 2;
  static vf at(const uint8_t* panel, int k, int j, int v) {
    const vu both = *reinterpret_cast<const vu_any*>(panel + size_t(k) * kPanel * 2 + v * W * 4);
    return j == 0 ? (vf)(both << 16) : (vf)(both & 0xffff0000u);
  }
};
struct I8Loader {
  static constexpr int kStep = 4;
  static vf at(const uint8_t* panel, int k, int j, int v) {
    const vi four = *reinterpret_cast<const vi_any*>(panel + size_t(k) * kPanel + v * W * 4);
    return __builtin_convertvector(four << (24 - 8 * j) >> 24, vf);
  }
};
struct I4Loader {
  static constexpr int kStep = 8;
  static constexpr size_t kGroupBytes = kPanel * 4 + kGroup / 2 * kPanel;
  static vf at(const uint8_t* panel, int k, int j, int v) {
    const uint8_t* group = panel + size_t(k / kGroup) * kGroupBytes;
    const vu both = *reinterpret_cast<const vu_any*>(group + v * W * 4);
    const vu eight = *reinterpret_cast<const vu_any*>(group + kPanel * 4 + size_t(k % kGroup) / 2 * kPanel + v * W * 4);
    const vi q = (vi)((eight >> (4 * j)) & 15u);
    return __builtin_convertvector(q, vf) * (vf)(both << 16) + (vf)(both & 0xffff0000u);
  }
};

// Where dot products have an instruction, `a` holds pairs of bfloat16, and a loader gives pair(panel, k, j): inputs k + j
// and k + j + 1, rounded to bfloat16, side by side (V is 1 there). Of int8 there is nothing to round.
template <class Loader>
struct Pairs {
  static constexpr int kStep = Loader::kStep;
  static constexpr uint32_t kHalf = std::is_same_v<Loader, I8Loader> ? 0 : 0x8000;  // to be added before the rest is cut
  static vf pair(const uint8_t* panel, int k, int j) {
    const vu low = (vu)Loader::at(panel, k, j, 0) + kHalf, high = (vu)Loader::at(panel, k, j + 1, 0) + kHalf;
    return (vf)(low >> 16 | (high & 0xffff0000u));
  }
};
template <>
struct Pairs<BF16Loader> {
  static constexpr int kStep = 2;
  static vf pair(const uint8_t* panel, int k, int) {
    return load(reinterpret_cast<const float*>(panel) + size_t(k) / 2 * kPanel);
  }
};
template <class Loader>
using Product = std::conditional_t<kDots, Pairs<Loader>, Loader>;
template <class Loader>
constexpr bool kPaired = false;
template <class Loader>
constexpr bool kPaired<Pairs<Loader>> = true;

// What to call for on the way: a line from `memory`, and one `apart` bytes from there, for each line of a panel that is read.
struct Ahead {
  const uint8_t* memory;
  size_t apart = 0;
};

// Adds to acc[r][p] the products of MR rows of `a` (k inputs each) with NP panels that are `stride` bytes apart. On the way
// it calls for the memory at `ahead`, a line for each line of the first panel, so that whoever reads that next finds it.
template <class Loader, int MR, int NP>
inline __attribute__((always_inline)) void accumulate(vf (&acc)[MR][NP][V], const uint8_t* panel, size_t stride,
                                                      const float* a, size_t lda, int k, const Ahead& ahead) {
  for (int i = 0; i < k; i += Loader::kStep) {
    __builtin_prefetch(ahead.memory + size_t(i / Loader::kStep) * 64, 0, 2);
    __builtin_prefetch(ahead.memory + ahead.apart + size_t(i / Loader::kStep) * 64, 0, 2);
    if constexpr (kPaired<Loader>) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 8
      for (int j = 0; j < Loader::kStep; j += 2) {
        __m512bh w[NP];
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) w[p] = (__m512bh)Loader::pair(panel + p * stride, i, j);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const __m512bh x = (__m512bh)_mm512_set1_epi32(reinterpret_cast<const int32_t*>(a)[r * lda + (i + j) / 2]);
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p) acc[r][p][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][p][0], x, w[p]);
        }
      }
#endif
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < Loader::kStep; ++j) {
        vf w[NP][V];
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            w[p][v] = Loader::at(panel + p * stride, i, j, v);
            if (MR > 1) hold(w[p][v]);
          }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const float x = a[r * lda + i + j];
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][p][v] += w[p][v] * x;
        }
      }
    }
  }
}

// Computes out[p][r][16] for MR rows and NP panels.
template <class Loader, int MR, int NP>
struct Tile {
  static void run(const uint8_t* panel, size_t stride, const float* a, size_t lda, int k, float* out,
                  const Ahead& ahead) {
    vf acc[MR][NP][V] = {};
    accumulate<Loader, MR, NP>(acc, panel, stride, a, lda, k, ahead);
    for (int p = 0; p < NP; ++p)
      for (int r = 0; r < MR; ++r)
        for (int v = 0; v < V; ++v) store(out + (p * MR + r) * kPanel + v * W, acc[r][p][v]);
  }
};

// How many panels a tile of so many rows takes: enough independent sums to hide an addition's latency, few enough that
// they stay in registers.
constexpr int wide(int rows) {
  if (V == 1) return rows == 1 ? 8 : 4;
  if (V == 2) return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  return rows == 1 ? 2 : 1;
}
constexpr int kWide = 8;

// `panels` panels from `panel` on, one tile of MR rows; out[p][r][16].
template <class Loader, int MR>
void panels_of(const uint8_t* panel, size_t stride, int panels, const float* a, size_t lda, int k, float* out,
               const Ahead& ahead) {
  constexpr int NP = wide(MR);
  int p = 0;
  for (; p + NP <= panels; p += NP, panel += NP * stride, out += NP * MR * kPanel)
    Tile<Loader, MR, NP>::run(panel, stride, a, lda, k, out, ahead);
  if constexpr (NP > 2)
    for (; p + 2 <= panels; p += 2, panel += 2 * stride, out += 2 * MR * kPanel)
      Tile<Loader, MR, 2>::run(panel, stride, a, lda, k, out, ahead);
  for (; p < panels; ++p, panel += stride, out += MR * kPanel)
    Tile<Loader, MR, 1>::run(panel, stride, a, lda, k, out, ahead);
}

template <class Loader>
void rows_of(const uint8_t* panel, size_t stride, int panels, const float* a, size_t lda, int rows, int k, float* out,
             const Ahead& ahead) {
  switch (rows) {
    case 1: return panels_of<Loader, 1>(panel, stride, panels, a, lda, k, out, ahead);
    case 2: return panels_of<Loader, 2>(panel, stride, panels, a, lda, k, out, ahead);
    case 3: return panels_of<Loader, 3>(panel, stride, panels, a, lda, k, out, ahead);
    case 4: return panels_of<Loader, 4>(panel, stride, panels, a, lda, k, out, ahead);
    case 5: return panels_of<Loader, 5>(panel, stride, panels, a, lda, k, out, ahead);
    default: return panels_of<Loader, 6>(panel, stride, panels, a, lda, k, out, ahead);
  }
}

}  // namespace hostler
