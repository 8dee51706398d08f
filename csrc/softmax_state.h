// Online softmax over a tile of logits, while the tile is in cache.
//
// Per row: max m, s = sum exp(z - m), w = sum exp(z - m) (z - m), target logit t. States of disjoint
// vocab ranges merge, so the vocabulary can be cut anywhere and no row of logits is ever whole.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace codistill {

// Columns of a tile come in this many; see softmax_state.cpp.
constexpr int64_t kLanes = 8;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

struct Softcap {
  float cap;  // 0: none
  float inverse;
};

struct State {
  float max, sum, weighted, target;
};

// Combine the states of two disjoint vocab ranges of one row; either may be empty (max = -inf).
inline State merge(const State& a, const State& b) {
  const float max = a.max > b.max ? a.max : b.max;
  State out{max, 0.0f, 0.0f, a.target + b.target};
  const State* parts[] = {&a, &b};
  for (const State* part : parts) {
    if (part->max == kMinusInf) continue;
    const float shift = part->max - max;
    const float factor = std::exp(shift);
    out.sum += factor * part->sum;
    out.weighted += factor * (part->weighted + shift * part->sum);
  }
  return out;
}

// Turn one row of a tile, x . w of `columns` vocab rows (a multiple of kLanes), into logits in place
// and return its state. Columns from `valid` on are outside the vocabulary. `target` is the column
// of the token, or -1.
State tile_state(float* row, int64_t columns, int64_t valid, const float* bias, Softcap softcap,
                 float inverse_temperature, int64_t target);

}  // namespace codistill
