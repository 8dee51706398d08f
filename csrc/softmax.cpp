#include "softmax.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "clones.h"

namespace codistill {
namespace {

constexpr int64_t kLanes = 8;  // on every machine: the order of a sum does not depend on its vectors
constexpr float kInf = std::numeric_limits<float>::infinity(), kMinusInf = -kInf;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kFar = -1e4f;  // exp of it is 0; a shifted logit of -inf would give 0 * inf

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using DoubleVec = double __attribute__((vector_size(kLanes * sizeof(double))));
using ShortVec = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
using LongVec = int64_t __attribute__((vector_size(kLanes * sizeof(int64_t))));

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

// exp(x) for x <= 0 to 2^-31; below -50 the value there, 2e-22.
CODISTILL_INLINE void exp_nonpositive(const DoubleVec& x, DoubleVec& result) {
  const DoubleVec clamped = x < -50.0 ? DoubleVec{} - 50.0 : x;
  const DoubleVec shifted = clamped * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const DoubleVec r = clamped - (shifted - 6755399441055744.0) * 0.69314718055994530942;
  DoubleVec p = r * (1.0 / 40320.0) + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // The low bits of `shifted` hold the whole number: no conversion, which AVX2 has not.
  LongVec scale;
  std::memcpy(&scale, &shifted, sizeof(scale));
  scale = (scale << 52) + (int64_t{1023} << 52);
  DoubleVec power;
  std::memcpy(&power, &scale, sizeof(power));
  result = p * power;
}

// softcap tanh(raw / softcap) / temperature, rounded once: a low temperature magnifies each ulp. fp64
// has digits to spare where 1 - exp(-2|x|) cancels, down to 2^-8; below, the series is as good.
CODISTILL_INLINE void softcapped(const Vec& raw, Scale scale, Vec& result) {
  const DoubleVec x = __builtin_convertvector(raw, DoubleVec) * (1.0 / scale.softcap);
  const DoubleVec size = x < 0.0 ? -x : x, square = x * x;
  DoubleVec e;
  exp_nonpositive(size * -2.0, e);
  const DoubleVec series = size - size * square * (1.0 / 3.0 - square * (2.0 / 15.0));
  const DoubleVec tanh = size < 0x1p-8 ? series : (1.0 - e) / (1.0 + e);
  const double limit = static_cast<double>(scale.softcap) / scale.temperature;
  const DoubleVec z = (x < 0.0 ? -tanh : tanh) * limit;
  result = __builtin_convertvector(z, Vec);
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

// Logits of the row, and their maximum. They are in `z`, columns from `valid` on -inf; or they are the
// raw ones.
CODISTILL_INLINE const float* scale_row(const float* raw, int64_t valid, Scale scale, float* z,
                                        float& max) {
  const bool is_raw = scale.softcap == 0.0f && scale.temperature == 1.0f && valid == kPanel;
  Vec best = Vec{} + kMinusInf;
  for (int64_t j = 0; is_raw && j < kPanel; j += kLanes) {
    Vec v;
    std::memcpy(&v, raw + j, sizeof(v));
    best = v > best ? v : best;
  }
  for (int64_t j = 0; !is_raw && j < kPanel; j += kLanes) {
    Vec v;
    std::memcpy(&v, raw + j, sizeof(v));
    if (scale.softcap != 0.0f) {
      const Vec raw_part = v;
      softcapped(raw_part, scale, v);
    } else if (scale.temperature != 1.0f) {
      // Not times the reciprocal: that rounds once more, and |z| ulps are the error of a logp.
      v /= scale.temperature;
    }
    if (j + kLanes > valid)
      for (int64_t lane = valid > j ? valid - j : 0; lane < kLanes; ++lane) v[lane] = kMinusInf;
    best = v > best ? v : best;
    std::memcpy(z + j, &v, sizeof(v));
  }
  max = max_lanes(best);
  return is_raw ? raw : z;
}

// No comparison sees NaN, and a maximum of +inf leaves no term besides its own: both must show.
CODISTILL_INLINE bool has_nan(const float* z, int64_t valid) {
  bool found = false;
  for (int64_t j = 0; j < valid; ++j) found |= std::isnan(z[j]);
  return found;
}

CODISTILL_INLINE bool is_undefined(const float* z, int64_t valid, float max) {
  return max == kInf || has_nan(z, valid);
}

// To the nearest, ties to even. v >= 0 or NaN.
CODISTILL_INLINE void round_and_store(const Vec& v, BFloat16* out) {
  IntVec bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ShortVec halves = __builtin_convertvector(bits, ShortVec);
  std::memcpy(out, &halves, sizeof(halves));
}

// The state of a row; with kKeep also exp(z) 2^-power, rounded.
template <bool kKeep>
CODISTILL_INLINE State state_of(const float* raw, int64_t valid, Scale scale, int64_t target,
                                BFloat16* exponentials, float* power) {
  alignas(64) float buffer[kPanel];
  State out = empty_state();
  const float* z = scale_row(raw, valid, scale, buffer, out.sum.max);
  if (target >= 0) out.target = z[target];
  if (std::isinf(out.sum.max)) {
    if (is_undefined(z, valid, out.sum.max)) out.sum.max = out.sum.rest = out.weighted = kNaN;
    if constexpr (kKeep) {  // of NaN the normalizer is NaN, which every multiple will show
      *power = 0.0f;
      std::memset(exponentials, 0, kPanel * sizeof(*exponentials));
    }
    return out;
  }
  float at_max = 1.0f;
  if constexpr (kKeep) {
    const double wanted = power_of(out.sum.max);
    *power = static_cast<float>(wanted);
    at_max = std::exp(static_cast<float>(out.sum.max - wanted * kLn2));
  }
  Vec rest = Vec{}, maxima = Vec{}, weighted = Vec{};
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    Vec v, e;
    std::memcpy(&v, z + j, sizeof(v));
    const Vec shifted = v - out.sum.max;
    exp_nonpositive(shifted, e);
    if constexpr (kKeep) round_and_store(e * at_max, exponentials + j);
    rest += v == out.sum.max ? Vec{} : e;
    maxima += v == out.sum.max ? Vec{} + 1.0f : Vec{};
    weighted += e * (shifted < kFar ? Vec{} : shifted);
  }
  out.sum.rest = sum_lanes(rest) + (sum_lanes(maxima) - 1.0f);
  out.weighted = sum_lanes(weighted);
  return out;
}

}  // namespace

State empty_state() { return {kMinusInf, 0.0f, 0.0f, 0.0f}; }

PairState empty_pair_state() { return {{kMinusInf, 0.0f}, {kMinusInf, 0.0f}, 0.0f}; }

Sum merge(const Sum& a, const Sum& b) {
  const bool first = a.max >= b.max || std::isnan(a.max);
  const Sum& high = first ? a : b;
  const Sum& low = first ? b : a;
  if (low.max == kMinusInf) return high;
  return {high.max, high.rest + std::exp(low.max - high.max) * (1.0f + low.rest)};
}

State merge(const State& a, const State& b) {
  const Sum sum = merge(a.sum, b.sum);
  State out{sum, 0.0f, a.target + b.target};
  for (const State* part : {&a, &b}) {
    if (part->sum.max == kMinusInf) continue;
    const float shift = part->sum.max - sum.max;
    out.weighted += std::exp(shift) * (part->weighted + shift * (1.0f + part->sum.rest));
  }
  return out;
}

PairState merge(const PairState& a, const PairState& b) {
  const Sum student = merge(a.student, b.student), teacher = merge(a.teacher, b.teacher);
  PairState out{student, teacher, 0.0f};
  for (const PairState* part : {&a, &b}) {
    if (part->student.max == kMinusInf) continue;
    const float shift = part->student.max - student.max;
    const float apart = shift - (part->teacher.max - teacher.max);
    out.difference += std::exp(shift) * (part->difference + apart * (1.0f + part->student.rest));
  }
  return out;
}

CODISTILL_CLONES
State row_state(const float* raw, int64_t valid, Scale scale, int64_t target) {
  return state_of<false>(raw, valid, scale, target, nullptr, nullptr);
}

CODISTILL_CLONES
State row_exponentials(const float* raw, int64_t valid, Scale scale, int64_t target,
                       BFloat16* exponentials, float* power) {
  return state_of<true>(raw, valid, scale, target, exponentials, power);
}

double power_of(float max) { return 64.0 * std::floor((max * kLog2E + 16.0) / 64.0); }

CODISTILL_CLONES
PairState row_pair_state(const float* student, const float* teacher, int64_t valid, Scale scale) {
  alignas(64) float buffer_s[kPanel], buffer_t[kPanel];
  PairState out = empty_pair_state();
  const float* z_s = scale_row(student, valid, scale, buffer_s, out.student.max);
  const float* z_t = scale_row(teacher, valid, scale, buffer_t, out.teacher.max);
  if (is_undefined(z_s, valid, out.student.max) || is_undefined(z_t, valid, out.teacher.max))
    return {{kNaN, kNaN}, {kNaN, kNaN}, kNaN};
  Vec rest_s = Vec{}, rest_t = Vec{}, maxima_s = Vec{}, maxima_t = Vec{}, difference = Vec{};
  const Vec none = Vec{}, one = Vec{} + 1.0f;
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    Vec s, t, p_s, p_t;
    std::memcpy(&s, z_s + j, sizeof(s));
    std::memcpy(&t, z_t + j, sizeof(t));
    const Vec far_s = s - out.student.max, far_t = t - out.teacher.max;
    exp_nonpositive(far_s, p_s);
    exp_nonpositive(far_t, p_t);
    rest_s += s == out.student.max ? none : p_s;
    rest_t += t == out.teacher.max ? none : p_t;
    maxima_s += s == out.student.max ? one : none;
    maxima_t += t == out.teacher.max ? one : none;
    difference += p_s > 0.0f ? p_s * (far_s - far_t) : none;
  }
  // A range that one model excludes wholly is empty for it: -inf - -inf above was NaN.
  const bool empty_s = out.student.max == kMinusInf, empty_t = out.teacher.max == kMinusInf;
  out.student.rest = empty_s ? 0.0f : sum_lanes(rest_s) + (sum_lanes(maxima_s) - 1.0f);
  out.teacher.rest = empty_t ? 0.0f : sum_lanes(rest_t) + (sum_lanes(maxima_t) - 1.0f);
  out.difference = empty_s ? 0.0f : empty_t ? -kMinusInf : sum_lanes(difference);
  return out;
}

float divergence(const PairState& state) {
  const float expected = state.difference / (1.0f + state.student.rest);
  const float kl = expected - std::log1p(state.student.rest) + std::log1p(state.teacher.rest);
  return kl < 0.0f ? 0.0f : kl;  // NaN stays
}

CODISTILL_CLONES
void row_gradient(const float* raw, int64_t valid, Scale scale, int64_t target,
                  const Coefficients& c, float* out) {
  alignas(64) float buffer[kPanel], dz[kPanel];
  float max;
  const float* z = scale_row(raw, valid, scale, buffer, max);
  float at_target = target >= 0 ? z[target] - c.max : 0.0f;
  if (at_target < kFar) at_target = kFar;
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    Vec v, p;
    std::memcpy(&v, z + j, sizeof(v));
    Vec shifted = v - c.max;
    shifted = shifted < kFar ? Vec{} + kFar : shifted;
    exp_nonpositive(shifted - c.log_sum, p);
    v = p * (c.c0 + c.c2 * (shifted - c.mean));
    std::memcpy(dz + j, &v, sizeof(v));
  }
  if (target >= 0) {
    // c0 p - c1 loses all digits where p is near 1 and c0 = c1: expm1 keeps them.
    const float logp = at_target - c.log_sum;
    dz[target] = c.c0 * std::expm1(logp) + (c.c0 - c.c1) +
                 c.c2 * std::exp(logp) * (at_target - c.mean);
  }
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    Vec v;
    std::memcpy(&v, dz + j, sizeof(v));
    if (scale.softcap != 0.0f) {
      Vec a, e;
      std::memcpy(&a, raw + j, sizeof(a));
      const Vec x = a / scale.softcap;
      exp_nonpositive((x < 0.0f ? x : -x) * 2.0f, e);
      v *= 4.0f * e / ((1.0f + e) * (1.0f + e));  // 1 - tanh^2 without its cancellation
    }
    if (scale.temperature != 1.0f) v /= scale.temperature;
    if (j + kLanes > valid)
      for (int64_t lane = valid > j ? valid - j : 0; lane < kLanes; ++lane) v[lane] = 0.0f;
    std::memcpy(out + j, &v, sizeof(v));
  }
}

}  // namespace codistill
