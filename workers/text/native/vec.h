// Vectors of the processor's own width in portable C++ (GCC and Clang vector extensions), and the few functions that
// transformers need on them. Above: linear.h, attention.h, decoder.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hostler {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Every weight panel, cache block and tile is this many columns wide, whatever the vector.
constexpr int kPanel = 16;
constexpr int V = kPanel / W;  // vectors in a panel

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t vi_any __attribute__((vector_size(W * 4), aligned(4)));
typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(4)));

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
// Keeps a loaded vector in a register: left alone, compilers load it anew for every multiplication.
inline void hold(vf& v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

inline vf splat(float x) { return vf{} + x; }

typedef uint16_t bf16;

inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; NaN stays NaN.
inline bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16(bits >> 16 | 0x40);
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rounds n floats. In place is fine.
inline void narrow_all(const float* from, int n, bf16* to) {
  int i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
  for (; i < n; ++i) to[i] = narrow(from[i]);
}

// |x| up to 2^22, to the nearest integer, ties to even.
inline int nearest(float x) {
  constexpr float kShift = 12582912.0f;
  return int((x + kShift) - kShift);
}

inline float magnitude(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The greatest absolute value of a row. Compared as integers, which order positive floats alike.
inline float peak(const bf16* row, int k) {
  uint16_t most = 0;
  for (int i = 0; i < k; ++i) most = std::max<uint16_t>(most, row[i] & 0x7fff);
  return widen(most);
}
inline float peak(const float* row, int k) {
  uint32_t most = 0;
  for (int i = 0; i < k; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, 4);
    most = std::max(most, bits & 0x7fffffff);
  }
  return magnitude(most);
}

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}

inline float highest(vf v) {
  float best = v[0];
  for (int i = 1; i < W; ++i) best = best > v[i] ? best : v[i];
  return best;
}

inline vf pick(vi mask, vf a, vf b) { return mask ? a : b; }

// Within these neither e^x nor its inverse is so small that processors would take a hundred cycles for it (denormal).
constexpr float kExpLow = -87.33654f, kExpHigh = 87.0f;

// e^x for x within those two bounds, to about 1 ulp: x = n ln 2 + r, a degree-6 polynomial in r (coefficients as in Cephes'
// expf), scaled by 2^n. NaN stays NaN.
inline vf exp_within(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504088896341f + shift) - shift;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)exponent;
}

// For x up to the upper bound; below the lower one the result is 0.
inline vf exp_below(vf x) {
  const vf low = splat(kExpLow);
  const vi underflow = x < low;
  return pick(underflow, vf{}, exp_within(pick(underflow, low, x)));
}

// For any x; above the upper bound it saturates.
inline vf exp(vf x) {
  const vf high = splat(kExpHigh);
  return exp_below(pick(x > high, high, x));
}

// 1 / x, to an ulp or two.
inline vf inverse(vf x) {
#if defined(__AVX512F__)
  const vf guess = (vf)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// Beyond the bounds e^-x is too small or too great to matter.
inline vf silu(vf x) {
  const vf low = splat(kExpLow), high = splat(kExpHigh);
  vf y = pick(-x < low, low, -x);
  y = pick(y > high, high, y);
  return x * inverse(exp_within(y) + 1.0f);
}

// GELU with the tanh approximation (PyTorch's gelu(approximate="tanh")); tanh(y) = 1 - 2 / (1 + e^2y).
inline vf gelu_tanh(vf x) {
  const vf y = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
  return x * 0.5f * (2.0f - splat(2.0f) / (exp(y * 2.0f) + 1.0f));
}

}  // namespace hostler
