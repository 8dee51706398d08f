#include "softmax_state.h"

#include <cstring>

// One source, compiled for AVX-512, AVX2 and the baseline; the loader picks. Eight lanes on all of
// them: the order of a sum does not depend on the machine's vector width.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CODISTILL_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CODISTILL_CLONES
#endif
#define CODISTILL_INLINE inline __attribute__((always_inline))

namespace codistill {
namespace {

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// exp(x) for x <= 0, at most 2 ulp off; 0 below -87.3, where the result would be subnormal.
CODISTILL_INLINE void exp_nonpositive(const Vec& x, Vec& result) {
  const Vec clamped = x < -87.3f ? Vec{} - 87.3f : x;
  const Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds
  const Vec n = shifted - 12582912.0f;
  // ln 2 in two parts: n times the first is exact.
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  Vec p = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  p = p * r + (1.0f / 120.0f);
  p = p * r + (1.0f / 24.0f);
  p = p * r + (1.0f / 6.0f);
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const IntVec scale = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &scale, sizeof(power));
  result = x < -87.3f ? Vec{} : p * power;
}

// tanh through expm1(-2|x|), which near 0 is its series: no cancellation.
CODISTILL_INLINE void tanh_all(const Vec& x, Vec& result) {
  const Vec u = (x < 0.0f ? x : -x) * 2.0f;
  Vec e;
  exp_nonpositive(u, e);
  Vec series = u * (1.0f / 40320.0f) + (1.0f / 5040.0f);
  series = series * u + (1.0f / 720.0f);
  series = series * u + (1.0f / 120.0f);
  series = series * u + (1.0f / 24.0f);
  series = series * u + (1.0f / 6.0f);
  series = series * u + 0.5f;
  series = series * u * u + u;
  const Vec em = u > -0.5f ? series : e - 1.0f;
  const Vec magnitude = -em / (em + 2.0f);
  result = x < 0.0f ? -magnitude : magnitude;
}

CODISTILL_INLINE float sum_lanes(const Vec& v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof(part));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

CODISTILL_INLINE float max_lanes(const Vec& v) {
  float best = v[0];
  for (int64_t i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace

CODISTILL_CLONES
State tile_state(float* row, int64_t columns, int64_t valid, const float* bias, float softcap,
                 float temperature, int64_t target) {
  Vec best = Vec{} + kMinusInf;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec z;
    std::memcpy(&z, row + j, sizeof(z));
    if (bias != nullptr) {
      Vec b;
      std::memcpy(&b, bias + j, sizeof(b));
      z += b;
    }
    if (softcap != 0.0f) {
      Vec capped;
      tanh_all(z / softcap, capped);
      z = capped * softcap;
    }
    // Not times the reciprocal: that rounds once more, and |z| ulps are the error of a logp.
    if (temperature != 1.0f) z /= temperature;
    if (j + kLanes > valid)
      for (int64_t lane = valid > j ? valid - j : 0; lane < kLanes; ++lane) z[lane] = kMinusInf;
    best = z > best ? z : best;
    std::memcpy(row + j, &z, sizeof(z));
  }
  State out{max_lanes(best), 0.0f, 0.0f, target >= 0 ? row[target] : 0.0f};
  if (out.max == kMinusInf) {  // no probability here; but NaN, which no comparison sees, must show
    for (int64_t j = 0; j < valid; ++j)
      if (std::isnan(row[j])) out.max = out.rest = out.weighted = kNaN;
    return out;
  }
  Vec rest = Vec{}, maxima = Vec{}, weighted = Vec{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec z;
    std::memcpy(&z, row + j, sizeof(z));
    const Vec shifted = z - out.max;
    Vec e;
    exp_nonpositive(shifted, e);
    rest += z == out.max ? Vec{} : e;
    maxima += z == out.max ? Vec{} + 1.0f : Vec{};
    weighted += e * (shifted < -87.3f ? Vec{} : shifted);  // 0 * -inf would be NaN
  }
  out.rest = sum_lanes(rest) + (sum_lanes(maxima) - 1.0f);
  out.weighted = sum_lanes(weighted);
  return out;
}

}  // namespace codistill
