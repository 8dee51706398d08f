// 16-bit floats, rounded to the nearest, ties to even; NaN stays NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace codistill {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  BFloat16(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    bits = std::isnan(value) ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE binary16. Without branches and without F16C: a loop over it becomes vectors on any machine.
struct Half {
  uint16_t bits;

  Half() = default;
  Half(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value), sign = (wide >> 16) & 0x8000;
    // Beyond the range of half the first factor gives infinity; the second brings the rest back, up
    // to the 2^2 that leaves subnormal halves in whole numbers of the sum below.
    const float scaled = std::abs(value) * 0x1p112f * 0x1p-110f;
    // Adding a power of two, at a fixed distance above the value but not below the smallest normal
    // half, cuts the value to half's digits: the addition rounds.
    const uint32_t exponent = (wide << 1) & 0xff000000u;
    const uint32_t above = (exponent < 0x71000000u ? 0x71000000u : exponent) >> 1;
    const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>(above + 0x07800000u) + scaled);
    const uint32_t rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
    bits = sign | (std::isnan(value) ? 0x7e00 : rounded);
  }
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16, magnitude = wide << 1;
    // Normal: the exponent is moved so that the one of infinity becomes that of fp32's infinity, and
    // multiplied back. Subnormal: digits below those of 0.5, which is subtracted.
    const float normal = std::bit_cast<float>((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
    const float subnormal = std::bit_cast<float>((magnitude >> 17) | 0x3f000000u) - 0.5f;
    const uint32_t result = std::bit_cast<uint32_t>(magnitude < (1u << 27) ? subnormal : normal);
    return std::bit_cast<float>((wide & 0x80000000u) | result);
  }
};

}  // namespace codistill
