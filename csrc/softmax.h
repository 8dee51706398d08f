// Row-wise softmax on a panel of raw logits, a = x . w + bias, while it is in cache.
//
//   z = softcap tanh(a / softcap) / temperature      (softcap 0: z = a / temperature)
#pragma once

#include <cstdint>

#include "tiles.h"

namespace codistill {

constexpr double kLn2 = 0.69314718055994530942, kLog2E = 1.4426950408889634074;

// How the raw logits of one row become logits.
struct Scale {
  float softcap;  // 0: none
  float temperature;
};

// The softmax's sum over a range of the vocabulary: max z, and sum exp(z - max) without one term of the
// maximum, which is 1: log1p(rest) keeps the digits of the small log-probability of a peaked row's
// token.
struct Sum {
  float max, rest;
};

struct State {
  Sum sum;
  float weighted;  // sum exp(z - max) (z - max)
  float target;    // z of the token, 0 if it is not in the range
};

// The sums of two models over the same range of the vocabulary, s the student and t the teacher.
struct PairState {
  Sum student, teacher;
  float difference;  // sum exp(z_s - max_s) ((z_s - max_s) - (z_t - max_t))
};

// The gradient of a row: dz_j = c0 p_j - c1 [j = target] + c2 p_j (z_j - E_p z).
struct Coefficients {
  float c0, c1, c2;
  float max, log_sum, mean;  // of the whole vocabulary: max z, log sum exp(z - max), E_p[z - max]
};

// The coefficients of row i, from coefficients [3, n] and lse_parts [3, n] of n rows.
inline Coefficients coefficients_of(const float* coefficients, const float* lse_parts, int64_t n, int64_t i) {
  return {coefficients[i], coefficients[n + i], coefficients[2 * n + i],
          lse_parts[i],    lse_parts[n + i],    lse_parts[2 * n + i]};
}

State empty_state();
PairState empty_pair_state();

// Combine two disjoint ranges of one row. Either may be empty (max = -inf); NaN in either stays.
State merge(const State& a, const State& b);
PairState merge(const PairState& a, const PairState& b);

// State of `valid` <= kPanel columns. `raw` [kPanel] is read whole; `target` is a column, or -1.
State row_state(const float* raw, int64_t valid, Scale scale, int64_t target);
// The same, and the row's exponentials exp(z) 2^-power [kPanel], rounded; 0 from `valid` on.
State row_exponentials(const float* raw, int64_t valid, Scale scale, int64_t target,
                       BFloat16* exponentials, float* power);
// The power of two for a range with this maximum, a multiple of 64: ranges of a row whose largest
// logits are between -11 and 33 nats have the same.
double power_of(float max);

PairState row_pair_state(const float* student, const float* teacher, int64_t valid, Scale scale);

// KL(student || teacher) from the state of the whole vocabulary; nats, not below 0.
float divergence(const PairState& state);

// out[j] = dz_j dz/da, [kPanel]; 0 from `valid` on. May be `raw` itself.
void row_gradient(const float* raw, int64_t valid, Scale scale, int64_t target,
                  const Coefficients& coefficients, float* out);

}  // namespace codistill
