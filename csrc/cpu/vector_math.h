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

// e^d as power * (1 + expm1), power a power of 2, to a relative error of about 1e-13, for d from
// -700 to 709: d = n ln 2 + r and expm1(r) by Taylor's series. What lies outside is taken for the
// nearer end. No branch and no call, so that the loops over rows vectorise; NaN stays NaN.
struct ExpParts {
  double power, expm1;
};

inline ExpParts exp_parts(double d) {
  constexpr double kToInteger = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double x = d < -700.0 ? -700.0 : (d > 709.0 ? 709.0 : d);
  const double shifted = x * 0x1.71547652b82fep0 + kToInteger;  // log2(e)
  const double n = shifted - kToInteger;
  const double r = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;  // ln2 in two parts
  double p = 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 1.0 / 2;
  p = (p * r + 1.0) * r;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits + 1023) << 52);
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return {power, p};
}

// What exceeds a double (d > 709) exceeds the float it is stored to all the same.
inline double expm1_vec(double d) {
  const ExpParts e = exp_parts(d);
  return e.power * e.expm1 + (e.power - 1.0);
}

// 0 below -104, where the exponential in fp32 is 0 as well.
inline double exp_vec(double d) {
  const ExpParts e = exp_parts(d);
  return d < -104.0 ? 0.0 : e.power + e.power * e.expm1;
}

inline double tanh_vec(double x) {
  const double magnitude = x < 0.0 ? -x : x;
  // 1 - 2 / (e^2x + 1), which is expm1 / (expm1 + 2); tanh(20) is 1 in a double.
  const double e = expm1_vec(2.0 * (magnitude > 20.0 ? 20.0 : magnitude));
  const double t = e / (e + 2.0);
  return x < 0.0 ? -t : t;
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
inline void store(double value, double* to) { *to = value; }
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
