// exp, tanh, bf16 and fp16 in a form that the compiler turns into vector instructions: no branch,
// no table, no library call. Coefficients are minimax fits made for these intervals; errors are
// against the exact function.
#ifndef LATRO_CPU_VECTOR_MATH_H_
#define LATRO_CPU_VECTOR_MATH_H_

#include <cstdint>
#include <cstring>

namespace latro {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// e^x for x < 88.7 to 2 ulp; 0 below -87.3, where the result would be subnormal; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r).
inline float exp_vec(float x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts; the first has so few digits that n times it is exact.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 0x1.6a2430p-10f;
  q = q * r + 0x1.1239e4p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const float power = float_of((bits_of(shifted) << 23) + (127u << 23));
  const float value = (q * (r * r) + r + 1.0f) * power;
  return x < -87.3f ? 0.0f : value;
}

// tanh to 3 ulp: an odd polynomial near 0, where the formula by exp would cancel.
inline float tanh_vec(float x) {
  const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
  const float s = x * x;
  float t = -0x1.76abf6p-8f;
  t = t * s + 0x1.5256cep-6f;
  t = t * s + -0x1.b84448p-5f;
  t = t * s + 0x1.110768p-3f;
  t = t * s + -0x1.555534p-2f;
  const float small = x + x * s * t;
  // tanh(10) is 1 in fp32. Written so that NaN passes.
  const float bounded = magnitude > 10.0f ? 10.0f : magnitude;
  const float large = 1.0f - 2.0f / (exp_vec(2.0f * bounded) + 1.0f);
  const float signed_large = float_of(bits_of(large) | (bits_of(x) & 0x80000000u));
  return magnitude < 0.625f ? small : signed_large;
}

struct bfloat16 {
  uint16_t bits;
};

// By hand, for _Float16 is not a type of every compiler, nor does every one vectorise it.
struct float16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float load(float16 x) {
  constexpr uint32_t kBias = (127u - 15u) << 23;
  constexpr uint32_t kInfinity = 31u << 23, kLeastNormal = 1u << 23;  // fp16's, before the bias
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // A subnormal is read as if it were normal, and the leading 1 that it lacks is taken off again.
  const float subnormal = float_of(magnitude + kBias + kLeastNormal) - 0x1p-14f;
  const uint32_t normal = magnitude + kBias + (magnitude >= kInfinity ? kBias : 0u);
  const uint32_t widened = magnitude < kLeastNormal ? bits_of(subnormal) : normal;
  return float_of(widened | (x.bits & 0x8000u) << 16);
}

inline void store(float value, float* to) { *to = value; }
// Round to nearest, ties to even.
inline void store(float value, bfloat16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
inline void store(float value, float16* to) {
  constexpr uint32_t kOverflow = 0x477ff000u;     // 65520, the least that rounds to infinity
  constexpr uint32_t kLeastNormal = 0x38800000u;  // 2^-14
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  // Adding 1/2 rounds at fp16's smallest step, 2^-24, and leaves the number of steps in the sum.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < kLeastNormal ? subnormal : normal;
  const uint32_t special = value != value ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude >= kOverflow ? special : finite;
  to->bits = static_cast<uint16_t>(rounded | (bits_of(value) >> 16 & 0x8000u));
}

}  // namespace latro

#endif  // LATRO_CPU_VECTOR_MATH_H_
