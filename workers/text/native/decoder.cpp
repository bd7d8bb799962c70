// One step of a decoder-only transformer over a paged cache: token ids in, logits out, one call.
//
// Above: runner.py calls these C functions through ctypes (which releases the interpreter lock for the whole step).
// Below: model.h, rows.h, product.h, attention.h, lora.h. A model is what describe.py describes: RMS norms, rotary positions,
// grouped heads, a gated MLP or several to choose from. Anything else stays with transformers' own definition.
#include <chrono>

#include "model.h"
#include "rows.h"

using namespace hostler;

namespace {

using Clock = std::chrono::steady_clock;

float widened(const Weight& w, int row, int input) {
  const uint8_t* panel = w.panel(row / kPanel);
  const int c = row % kPanel;
  if (w.kind == Kind::I8) {
    return reinterpret_cast<const int8_t*>(panel)[size_t(input / 4) * kPanel * 4 + c * 4 + input % 4] * w.scales[row];
  }
  return w.kind == Kind::BF16 ? widen(reinterpret_cast<const bf16*>(panel)[input / 2 * kPanel * 2 + c * 2 + input % 2])
                              : reinterpret_cast<const float*>(panel)[input * kPanel + c];
}

// The inputs of a layer's product: float32 rows, or rows that were made as the product wants them.
struct Inputs {
  const Rows* made;
  const float* a;
  size_t lda;
};

template <class Done>
void product_of(Model& m, int layer, Which which, const Inputs& inputs, int rows, int unit, const Done& done) {
  const Weight& w = m.layers[layer].weight[which];
  if (inputs.made) return product(m.pool, w, *inputs.made, rows, unit, done);
  const Added added = m.adapters.of(m.pool, layer * WEIGHTS + which, w, inputs.a, inputs.lda);
  product(m.pool, w, inputs.a, inputs.lda, rows, unit, done, added);
}

// Inputs times a layer's weight, perhaps normalized, scaled, added to x.
void add_product(Model& m, int layer, Which which, const Inputs& inputs, int rows) {
  const auto& c = m.config;
  const auto& post = m.layers[layer].vector[which == OUT ? ATTENTION_POST_NORM : MLP_POST_NORM];
  if (post.empty()) {
    product_of(m, layer, which, inputs, rows, 1, [&](int row, int count, int panel, int panels, const float* out) {
      for (int p = 0; p < panels; ++p)
        for (int r = 0; r < count; ++r) {
          float* x = m.x.get() + size_t(row + r) * c.hidden + (panel + p) * kPanel;
          for (int v = 0; v < kPanel; v += W)
            store(x + v, load(x + v) + load(out + (p * count + r) * kPanel + v) * c.residual_scale);
        }
    });
    return;
  }
  float* target = m.normed.get();
  product_of(m, layer, which, inputs, rows, 1, [&](int row, int count, int panel, int panels, const float* out) {
    put(row, count, panel, panels, out, target, c.hidden);
  });
  each_row(m.pool, rows, [&](int r) {
    float *t = target + size_t(r) * c.hidden, *x = m.x.get() + size_t(r) * c.hidden;
    rms_norm(t, post.data(), c.eps, c.hidden, t);
    for (int i = 0; i < c.hidden; i += W) store(x + i, load(x + i) + load(t + i) * c.residual_scale);
  });
}

struct Item {
  int32_t sequence, head, first, count;  // queries first … of the sequence's rows * group
};

void attention(Model& m, const Step& step, const Layer& layer, int index, const std::vector<Item>& items) {
  const auto& c = m.config;
  const int group = c.heads / c.kv_heads, width = m.qkv_width();
  m.pool.run(int(items.size()), [&](int i) {
    const Item& item = items[i];
    const SequenceRows& s = step.sequence[item.sequence];
    Queries q;
    for (int j = 0; j < item.count; ++j) {
      const int row = (item.first + j) / group, head = item.head * group + (item.first + j) % group;
      q.rows[j] = m.qkv.get() + size_t(s.first_row + row) * width + size_t(head) * c.head_dim;
      q.out[j] = m.attended.get() + (size_t(s.first_row + row) * c.heads + head) * c.head_dim;
      q.position[j] = s.start + row;
    }
    const int32_t* table = step.tables + size_t(s.table) * step.table_stride;
    attend(m.cache, index, item.head, table, q, item.count, layer.window);
  });
}

// Norms and rotates queries and keys of each row, scales queries, and writes keys and values to the cache.
void place(Model& m, const Step& step, const Layer& layer, int index, const std::vector<int32_t>& owner,
           const std::vector<int32_t>& places) {
  const auto& c = m.config;
  const int half = c.rotary_dim / 2;
  auto body = [&](int r) {
    float* row = m.qkv.get() + size_t(r) * m.qkv_width();
    const SequenceRows& s = step.sequence[owner[r]];
    for (int h = 0; h < c.heads + c.kv_heads; ++h) {
      float* head = row + size_t(h) * c.head_dim;
      const auto& norm = layer.vector[h < c.heads ? QUERY_NORM : KEY_NORM];
      if (!norm.empty()) rms_norm(head, norm.data(), c.eps, c.head_dim, head);
      if (layer.rope >= 0)
        rotate(head, step.cosines[layer.rope] + size_t(r) * half, step.sines[layer.rope] + size_t(r) * half, half);
      if (h < c.heads)
        for (int i = 0; i < c.head_dim; i += W) store(head + i, load(head + i) * c.attention_scale);
    }
    const int position = s.start + r - s.first_row;
    const int32_t block = step.tables[size_t(s.table) * step.table_stride + position / kBlock];
    const bool last = r + 1 == s.first_row + s.rows;
    for (int h = 0; h < c.kv_heads; ++h) {
      const float* key = row + size_t(c.heads + h) * c.head_dim;
      write_position(m.cache, m.cache.block(index, block, h), position % kBlock, key, key + c.kv_heads * c.head_dim, last);
    }
  };
  m.pool.run(int(places.size()) - 1, [&](int i) {
    for (int r = places[i]; r < places[i + 1]; ++r) body(r);
  });
}

// Where to cut a step's rows for `place`: a few at a time, but never between two of one block, whose lines two threads would
// take from each other.
std::vector<int32_t> cut(const Step& step, const std::vector<int32_t>& owner) {
  std::vector<int32_t> places = {0};
  for (int r = 1; r < step.rows; ++r) {
    const SequenceRows& s = step.sequence[owner[r]];
    const bool same_block = owner[r] == owner[r - 1] && (s.start + r - s.first_row) % kBlock != 0;
    if (r - places.back() >= kRowsPerChunk && !same_block) places.push_back(r);
  }
  places.push_back(step.rows);
  return places;
}

// Adds to x what each row's experts make of its normed one.
void mix(Model& m, const Experts& experts, int rows) {
  const auto& c = m.config;
  const int chosen = experts.chosen, count = int(experts.each.size());
  const size_t wide = size_t(experts.router.panels) * kPanel, gated = size_t(experts.each[0].gate_up.panels) / 2 * kPanel;
  product(m.pool, experts.router, m.normed.get(), c.hidden, rows, 1,
          [&](int row, int n, int panel, int panels, const float* out) {
            put(row, n, panel, panels, out, m.scores.get(), wide);
          });
  each_row(m.pool, rows, [&](int r) {
    choose(m.scores.get() + r * wide, count, chosen, experts.normalized, &m.expert[r * chosen], &m.share[r * chosen]);
  });
  m.routing.line_up(m.expert.data(), rows, chosen, count);
  const int lined_up = m.routing.rows();
  each_row(m.pool, lined_up, [&](int place) {
    std::memcpy(m.lined_up.get() + size_t(place) * c.hidden, m.normed.get() + size_t(m.routing.source(place)) * c.hidden,
                size_t(c.hidden) * sizeof(float));
  });
  auto through = [&](Weight Expert::*which, int unit, const float* a, size_t lda, const auto& take) {
    const std::vector<Job> jobs = m.routing.jobs(m.pool, experts, which, unit);
    if (jobs.empty()) return;
    Rows& inputs = rows_of_thread();
    inputs.take(m.pool, jobs[0].way, a, lda, lined_up, jobs[0].weight->k, m.routing.slots());
    products(m.pool, jobs, inputs, take);
  };
  through(&Expert::gate_up, 2, m.lined_up.get(), c.hidden, [&](int row, int n, int panel, int panels, const float* out) {
    gate(c.gelu, row, n, panel, panels, out, [&](int r, int i, const float* made) {
      std::memcpy(m.gated.get() + size_t(r) * gated + i, made, kPanel * sizeof(float));
    });
  });
  through(&Expert::down, 1, m.gated.get(), gated, [&](int row, int n, int panel, int panels, const float* out) {
    put(row, n, panel, panels, out, m.spread.get(), c.hidden);
  });
  each_row(m.pool, rows, [&](int r) {
    float* x = m.x.get() + size_t(r) * c.hidden;
    for (int i = 0; i < chosen; ++i) {
      const float* from = m.spread.get() + size_t(m.routing.place(r, i, chosen)) * c.hidden;
      const float share = m.share[r * chosen + i] * c.residual_scale;
      for (int d = 0; d < c.hidden; d += W) store(x + d, load(x + d) + load(from + d) * share);
    }
  });
}

void embed(Model& m, const Step& step) {
  const auto& c = m.config;
  const Weight& table = m.embedding.data ? m.embedding : m.head;
  each_row(m.pool, step.rows, [&](int r) {
    float* x = m.x.get() + size_t(r) * c.hidden;
    for (int i = 0; i < c.hidden; ++i) x[i] = widened(table, step.tokens[r], i) * c.embed_scale;
  });
  for (int o = 0; o < step.overrides; ++o)
    std::memcpy(m.x.get() + size_t(step.override_row[o]) * c.hidden, step.override_value + size_t(o) * c.hidden,
                size_t(c.hidden) * 4);
}

void run(Model& m, const Step& step) {
  const auto& c = m.config;
  auto mark = Clock::now();
  auto took = [&](Stage stage) {
    const auto now = Clock::now();
    m.seconds[stage] += std::chrono::duration<double>(now - mark).count();
    mark = now;
  };
  m.packing.reset();
  m.pool.limit(step.threads, parts_of(step.rows, step.threads));
  m.reserve(step.rows);
  std::vector<Item> items;
  std::vector<int32_t> owner(step.rows);
  const int group = c.heads / c.kv_heads, width = m.qkv_width(), most = queries_at_once(m.cache);
  for (int s = 0; s < step.sequences; ++s) {
    const int queries = step.sequence[s].rows * group;
    for (int first = 0; first < queries; first += most)
      for (int h = 0; h < c.kv_heads; ++h) items.push_back({s, h, first, std::min(most, queries - first)});
    for (int r = 0; r < step.sequence[s].rows; ++r) owner[step.sequence[s].first_row + r] = s;
  }
  const std::vector<int32_t> places = cut(step, owner);
  if (step.adapter) m.adapters.begin(step.rows, [&](int row) { return step.adapter[owner[row]]; });
  else m.adapters.begin();
  embed(m, step);
  float *x = m.x.get(), *normed = m.normed.get();
  // Rows are made as the product of `w` wants them, in `to`, unless it wants float32, or an adapter may want that, too.
  auto begin = [&](Rows& to, const Weight& w) {
    const Way way = way_of(w.kind);
    if (way == Way::FLOATS || step.adapter) return false;
    to.begin(way, step.rows, w.k);
    return true;
  };
  auto norm_rows = [&](const std::vector<float>& weight, const Weight& w) {
    const bool made = w.panels && begin(m.made, w);
    each_row(m.pool, step.rows, [&](int r) {
      float* to = normed + size_t(r) * c.hidden;
      thread_local std::vector<float> row;
      if (made) row.resize(c.hidden), to = row.data();
      rms_norm(x + size_t(r) * c.hidden, weight.data(), c.eps, c.hidden, to);
      if (made) m.made.set(r, to);
    });
    return Inputs{made ? &m.made : nullptr, normed, size_t(c.hidden)};
  };
  for (int l = 0; l < c.layers; ++l) {
    const Layer& layer = m.layers[l];
    const Inputs to_qkv = norm_rows(layer.vector[ATTENTION_NORM], layer.weight[QKV]);
    took(OTHER);
    product_of(m, l, QKV, to_qkv, step.rows, 1, [&](int row, int count, int panel, int panels, const float* out) {
      put(row, count, panel, panels, out, m.qkv.get(), width);
    });
    took(LINEAR);
    place(m, step, layer, l, owner, places);
    attention(m, step, layer, l, items);
    took(ATTENTION);
    add_product(m, l, OUT, {nullptr, m.attended.get(), size_t(c.heads) * c.head_dim}, step.rows);
    took(LINEAR);
    const Inputs to_mlp = norm_rows(layer.vector[MLP_NORM], layer.weight[GATE_UP]);
    took(OTHER);
    if (layer.experts.chosen) {
      mix(m, layer.experts, step.rows);
      took(LINEAR);
      continue;
    }
    const Weight& down = layer.weight[DOWN];
    const size_t gated_width = size_t(layer.weight[GATE_UP].panels) / 2 * kPanel;
    const bool made = begin(m.gates, down) && m.gates.takes_pieces();
    product_of(m, l, GATE_UP, to_mlp, step.rows, 2, [&](int row, int count, int panel, int panels, const float* out) {
      gate(c.gelu, row, count, panel, panels, out, [&](int r, int i, const float* values) {
        if (made) m.gates.set_piece(r, i, values);
        else std::memcpy(m.gated.get() + size_t(r) * gated_width + i, values, kPanel * sizeof(float));
      });
    });
    add_product(m, l, DOWN, {made ? &m.gates : nullptr, m.gated.get(), gated_width}, step.rows);
    took(LINEAR);
  }
  for (int i = 0; i < step.logit_rows; ++i)
    rms_norm(x + size_t(step.logit_row[i]) * c.hidden, m.final_norm.data(), c.eps, c.hidden, normed + size_t(i) * c.hidden);
  took(OTHER);
  product(m.pool, m.head, normed, c.hidden, step.logit_rows, 1,
          [&](int row, int count, int panel, int panels, const float* out) {
            for (int p = 0; p < panels; ++p)
              for (int r = 0; r < count; ++r) {
                const int first = (panel + p) * kPanel, n = std::min(kPanel, c.vocab - first);
                float* target = step.logits + size_t(row + r) * c.vocab + first;
                for (int i = 0; i < n; ++i) target[i] = out[(p * count + r) * kPanel + i] * c.logit_scale;
              }
          });
  took(HEAD);
}

Weight& weight_of(Model& m, int layer, int which) {
  if (layer >= 0 && which >= FIRST_EXPERT) {
    Expert& expert = m.layers[layer].experts.each[(which - FIRST_EXPERT) / 2];
    return (which - FIRST_EXPERT) % 2 ? expert.down : expert.gate_up;
  }
  if (layer >= 0) return which == ROUTER ? m.layers[layer].experts.router : m.layers[layer].weight[which];
  return which == 0 ? m.head : m.embedding;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

Model* hostler_model_new(const ModelConfig* config) try {
  return new Model(*config);
} catch (const std::exception&) {
  return nullptr;
}

void hostler_model_free(Model* m) { delete m; }

// Packs `count` row-major sources stacked along the outputs. Layer -1: which 0 is the head, 1 an embedding of its own.
int hostler_set_weight(Model* m, int layer, int which, int kind, int count, const void* const* data, const int32_t* rows,
                       int k, int is_bf16, int interleave) try {
  std::vector<Source> sources;
  for (int i = 0; i < count; ++i) sources.push_back({data[i], is_bf16 != 0, rows[i], k});
  weight_of(*m, layer, which) = pack(m->packers(), m->arena, Kind(kind), sources.data(), count, interleave != 0);
  return 0;
} catch (const std::exception&) {
  return -1;
}

int hostler_set_bias(Model* m, int layer, int which, const float* bias, int n) try {
  Weight& w = weight_of(*m, layer, which);
  w.bias = allocate<float>(size_t(w.panels) * kPanel);
  std::fill_n(w.bias.get(), size_t(w.panels) * kPanel, 0.0f);
  std::copy_n(bias, n, w.bias.get());
  return 0;
} catch (const std::exception&) {
  return -1;
}

// Layer -1: the final norm.
void hostler_set_vector(Model* m, int layer, int which, const float* values, int n) {
  (layer < 0 ? m->final_norm : m->layers[layer].vector[which]).assign(values, values + n);
}

// Adds up (down x) to one product of a layer, for rows with this adapter: to its panels first, first + step, … down is
// (rank, inputs), up (outputs, rank), both row-major float32, the factor in one of them; the rank is a multiple of 16.
int hostler_add_low_rank(Model* m, int adapter, int layer, int which, const float* down, const float* up, int rank,
                         int inputs, int outputs, int first, int step) try {
  const Source narrowing{down, false, rank, inputs}, widening{up, false, outputs, rank};
  LowRank low;
  low.down = pack(m->packers(), m->arena, Kind::F32, &narrowing, 1, false);
  low.up = pack(m->packers(), m->arena, Kind::F32, &widening, 1, false);
  low.first = first, low.step = step;
  m->adapters.add(adapter, layer * WEIGHTS + which, std::move(low));
  return 0;
} catch (const std::exception&) {
  return -1;
}

// Has a layer mix experts: `chosen` of `count` for each row. Their weights are set afterwards.
void hostler_set_experts(Model* m, int layer, int count, int chosen, int normalized) {
  Experts& experts = m->layers[layer].experts;
  experts.each.resize(count);
  experts.chosen = chosen, experts.normalized = normalized != 0;
}

void hostler_set_layer(Model* m, int layer, int window, int rope) {
  m->layers[layer].window = window, m->layers[layer].rope = rope;
}

int hostler_step(Model* m, const Step* step) try {
  run(*m, *step);
  return 0;
} catch (const std::exception&) {
  return -1;
}

// Ends the threads that packed, and those of steps: the next step starts its own.
void hostler_rest(Model* m) { m->rest(); }

// Has a cache of so many blocks, at most those of the configuration; the contents of from[i] go to to[i].
int hostler_resize(Model* m, int64_t blocks, int count, const int64_t* from, const int64_t* to) {
  if (blocks > m->config.blocks) return -1;
  m->resize(blocks, count, from, to);
  return 0;
}

// Seconds spent in linear layers, attention, the head and the rest since the last call.
void hostler_seconds(Model* m, double* out) {
  for (int i = 0; i < STAGES; ++i) out[i] = m->seconds[i], m->seconds[i] = 0;
}

// Bytes of all packed weights.
int64_t hostler_weight_bytes(Model* m) {
  auto bytes = [](const Weight& w) {
    const int64_t scales = w.scales ? int64_t(w.panels) * kPanel * 4 : 0;
    return int64_t(w.panels) * int64_t(w.stride) + scales;
  };
  int64_t total = bytes(m->head) + bytes(m->embedding);
  for (const Layer& layer : m->layers) {
    for (const Weight& w : layer.weight) total += bytes(w);
    total += bytes(layer.experts.router);
    for (const Expert& expert : layer.experts.each) total += bytes(expert.gate_up) + bytes(expert.down);
  }
  return total;
}

}  // extern "C"
#pragma GCC visibility pop
