// A layer's mixture of experts: which of them take a row, and in what order rows stand for them. Above: decoder.cpp.
// Below: product.h.
//
// Every row has its own few experts. Rows are lined up by expert, so that each expert's products are those of some
// consecutive rows, and all experts' products run in one loop over the threads.
#pragma once
#include <vector>

#include "product.h"

namespace hostler {

struct Expert {
  Weight gate_up, down;
};

struct Experts {
  Weight router;            // (experts, hidden)
  std::vector<Expert> each;
  int chosen = 0;           // for a row
  bool normalized = false;  // whether a row's shares add up to one
};

// Turns a row's scores, whole panels of them, into probabilities and takes the `chosen` greatest, the first of equal ones.
// A row of NaN gets any experts and shares of NaN.
inline void choose(float* scores, int count, int chosen, bool normalized, int32_t* expert, float* share) {
  float peak = scores[0], taken = 0;
  for (int e = 1; e < count; ++e) peak = scores[e] > peak ? scores[e] : peak;
  for (int e = count; e % kPanel; ++e) scores[e] = -INFINITY;
  vf totals = {};
  for (int e = 0; e < count; e += W) {
    const vf odds = exp(load(scores + e) - peak);
    store(scores + e, odds);
    totals += odds;
  }
  const float total = sum(totals);
  for (int i = 0; i < chosen; ++i) {
    int best = -1;
    for (int e = 0; e < count; ++e)
      if (scores[e] != -1.0f && (best < 0 || scores[e] > scores[best])) best = e;
    expert[i] = best, share[i] = scores[best] / total;
    taken += share[i];
    scores[best] = -1.0f;
  }
  for (int i = 0; i < chosen && normalized; ++i) share[i] /= taken;
}

// The rows of one step at one layer, lined up by expert.
class Routing {
 public:
  // `expert` (rows, chosen) of each row.
  void line_up(const int32_t* expert, int rows, int chosen, int experts) {
    count_.assign(experts, 0), first_.resize(experts), first_slot_.resize(experts);
    for (int i = 0; i < rows * chosen; ++i) ++count_[expert[i]];
    int first = 0, slot = 0;
    for (int e = 0; e < experts; ++e) {
      first_[e] = first, first_slot_[e] = slot;
      first += count_[e], slot += (count_[e] + amx::kRows - 1) / amx::kRows * amx::kRows;
    }
    source_.resize(rows * chosen), place_.resize(rows * chosen), slot_.resize(rows * chosen);
    std::vector<int> next(experts, 0);
    for (int i = 0; i < rows * chosen; ++i) {
      const int e = expert[i], at = next[e]++;
      place_[i] = first_[e] + at;
      source_[first_[e] + at] = i / chosen, slot_[first_[e] + at] = first_slot_[e] + at;
    }
  }

  // The products of all experts that have rows, with one of their weights.
  std::vector<Job> jobs(const Pool& pool, const Experts& experts, Weight Expert::*which, int unit) const {
    std::vector<Job> out;
    for (int e = 0; e < int(experts.each.size()); ++e)
      if (count_[e]) out.emplace_back(pool.size(), experts.each[e].*which, first_[e], first_slot_[e], count_[e], unit);
    return out;
  }
  int rows() const { return int(source_.size()); }
  int source(int place) const { return source_[place]; }  // which row of the step stands there
  int place(int row, int i, int chosen) const { return place_[row * chosen + i]; }  // where a row stands for its i-th expert
  const int32_t* slots() const { return slot_.data(); }

 private:
  std::vector<int> count_, first_, first_slot_;
  std::vector<int32_t> source_, place_, slot_;
};

}  // namespace hostler
