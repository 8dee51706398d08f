// Online softmax over a tile of logits, while the tile is in cache.
//
// Per row: max m, rest r = sum exp(z - m) without the term of one maximum, which is 1,
// w = sum exp(z - m) (z - m), target logit t. lse = m + log1p(r): where one token has nearly all the
// mass, 1 + r would round its small log-probability away. States of disjoint vocab ranges merge, so
// the vocabulary can be cut anywhere and no row of logits is ever whole.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace codistill {

// Columns of a tile come in this many; see softmax_state.cpp.
constexpr int64_t kLanes = 8;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct State {
  float max, rest, weighted, target;
};

// Combine the states of two disjoint vocab ranges of one row; either may be empty (max = -inf), and
// NaN in either stays.
inline State merge(const State& a, const State& b) {
  const bool first = a.max >= b.max || std::isnan(a.max);
  const State& high = first ? a : b;
  const State& low = first ? b : a;
  State out{high.max, high.rest, high.weighted, a.target + b.target};
  if (low.max == kMinusInf) return out;
  const float shift = low.max - high.max;
  const float factor = std::exp(shift), sum = 1.0f + low.rest;
  out.rest += factor * sum;
  out.weighted += factor * (low.weighted + shift * sum);
  return out;
}

// Turn one row of a tile, x . w of `columns` vocab rows (a multiple of kLanes), into logits in place
// and return its state. Columns from `valid` on are outside the vocabulary. softcap: 0 is none.
// `target` is the column of the token, or -1.
State tile_state(float* row, int64_t columns, int64_t valid, const float* bias, float softcap,
                 float temperature, int64_t target);

}  // namespace codistill
