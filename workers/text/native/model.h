// A packed model, its cache, its activations, and what a step is told. Above: decoder.cpp. Below: attention.h, experts.h, lora.h.
// decoder.py mirrors ModelConfig and Step field by field.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "lora.h"

namespace hostler {

struct ModelConfig {
  int32_t layers, hidden, heads, kv_heads, head_dim, rotary_dim, intermediate, vocab;
  int32_t gelu;         // 1: gelu(tanh), 0: silu
  int32_t cache_kind;   // Kind of keys and values: F32 or BF16
  int32_t threads;
  int64_t blocks;       // that the cache has address space for
  float eps, embed_scale, attention_scale, residual_scale, logit_scale;
};

// Rows of a step are tokens; a sequence owns `rows` consecutive ones from `first_row`, at positions `start` on.
struct SequenceRows {
  int32_t first_row, rows, start, table;
};

struct Step {
  int32_t rows, sequences, logit_rows, overrides, table_stride, threads;
  const int32_t* tokens;         // (rows,)
  const SequenceRows* sequence;  // (sequences,)
  const int32_t* tables;         // (tables, table_stride) block indices
  const float* const* cosines;   // one (rows, rotary_dim / 2) array for each kind of rotary positions
  const float* const* sines;
  const int32_t* logit_row;      // (logit_rows,)
  float* logits;                 // (logit_rows, vocab)
  const int32_t* override_row;   // rows whose embedding is given: (overrides,)
  const float* override_value;   // (overrides, hidden)
  const int32_t* adapter;        // (sequences,) of each, -1 for none; null when none has any
};

// A layer's weights. Behind them its router, and for each expert what GATE_UP and DOWN are elsewhere.
enum Which { QKV, OUT, GATE_UP, DOWN, WEIGHTS, ROUTER = WEIGHTS, FIRST_EXPERT };
enum Vector { ATTENTION_NORM, ATTENTION_POST_NORM, MLP_NORM, MLP_POST_NORM, QUERY_NORM, KEY_NORM, VECTORS };
enum Stage { LINEAR, ATTENTION, HEAD, OTHER, STAGES };

struct Layer {
  Weight weight[WEIGHTS];
  std::vector<float> vector[VECTORS];
  Experts experts;           // instead of GATE_UP and DOWN, or none
  int window = 0, rope = 0;  // 0: no window; -1: no rotary positions
};

struct Model {
  ModelConfig config;
  Pool pool;                      // of steps
  std::unique_ptr<Pool> packing;  // of the load, with its caller's priority; gone once steps run
  Arena arena;
  std::vector<Layer> layers;
  Weight head;
  Weight embedding;  // empty when the head is the embedding too
  std::vector<float> final_norm;
  Adapters adapters;  // of product number layer * WEIGHTS + which
  Cache cache;
  size_t cache_bytes = 0;
  Buffer<float> x, normed, qkv, attended, gated;
  Rows made, gates;  // normed and gated rows as the next product wants them
  size_t capacity = 0;
  Routing routing;
  Buffer<float> scores, lined_up, spread;  // of experts: (rows, experts); (rows * chosen, hidden) both
  std::vector<int32_t> expert;             // (rows, chosen)
  std::vector<float> share;
  double seconds[STAGES] = {};

  explicit Model(const ModelConfig& c) : config(c), pool(c.threads), layers(c.layers) {
    cache.kind = Kind(c.cache_kind), cache.layers = c.layers, cache.kv_heads = c.kv_heads, cache.head_dim = c.head_dim;
    cache_bytes = c.blocks * cache.whole();
    // Address space only: the system commits a page when a position is first written to it.
    void* p = mmap(nullptr, cache_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, cache_bytes, MADV_HUGEPAGE);
    cache.data = static_cast<uint8_t*>(p);
  }
  ~Model() { munmap(cache.data, cache_bytes); }

  Pool& packers() {
    if (!packing) packing = std::make_unique<Pool>(config.threads), packing->limit(config.threads);
    return *packing;
  }

  // Ends all threads; steps start their own anew.
  void rest() { packing.reset(), pool.stop(); }

  // Moves blocks `from[i]` to `to[i]`, then gives back the memory of all blocks from number `blocks` on.
  void resize(int64_t blocks, int count, const int64_t* from, const int64_t* to) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), end = config.blocks * cache.whole();
    for (int i = 0; i < count; ++i)
      std::memcpy(cache.data + to[i] * cache.whole(), cache.data + from[i] * cache.whole(), cache.whole());
    const size_t begin = (blocks * cache.whole() + page - 1) / page * page;
    if (begin < end) madvise(cache.data + begin, end - begin, MADV_DONTNEED);
  }

  int qkv_width() const { return (config.heads + 2 * config.kv_heads) * config.head_dim; }

  void reserve(size_t rows) {
    if (rows <= capacity) return;
    x = allocate<float>(rows * config.hidden);
    normed = allocate<float>(rows * config.hidden);
    qkv = allocate<float>(rows * qkv_width());
    attended = allocate<float>(rows * config.heads * config.head_dim);
    size_t chosen = 0, experts = 0;
    for (const Layer& layer : layers) {
      chosen = std::max(chosen, size_t(layer.experts.chosen));
      experts = std::max(experts, size_t(layer.experts.router.panels) * kPanel);
    }
    gated = allocate<float>(rows * std::max<size_t>(chosen, 1) * ((config.intermediate + kPanel - 1) / kPanel * kPanel));
    scores = allocate<float>(rows * experts);
    lined_up = allocate<float>(rows * chosen * config.hidden), spread = allocate<float>(rows * chosen * config.hidden);
    expert.resize(rows * chosen), share.resize(rows * chosen);
    capacity = rows;
  }
};

}  // namespace hostler
