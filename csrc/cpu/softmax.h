// What happens to a row of logits between the products, and to its gradient: shared by every op
// that folds logits on the CPU. All of it works on a short stretch of a row at a time.
#ifndef LATRO_CPU_SOFTMAX_H_
#define LATRO_CPU_SOFTMAX_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vector_math.h"

namespace latro {

constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A sum that holds a 1 loses digits of each small term: so many terms a lane, then a sum of these.
#if defined(__AVX512F__)
constexpr int64_t kStretch = 12 * 16;
#elif defined(__AVX__)
constexpr int64_t kStretch = 12 * 8;
#else
constexpr int64_t kStretch = 12 * 4;
#endif

// The largest of n numbers and `start`.
template <typename Real>
Real largest(const Real* z, int64_t n, Real start) {
#pragma omp simd reduction(max : start)
  for (int64_t j = 0; j < n; ++j) start = z[j] > start ? z[j] : start;
  return start;
}

template <typename Real, typename T>
void store_all(const Real* from, int64_t n, T* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(from[j], to + j);
}

// to = from, or += with `add`.
template <typename Real, typename Sum>
void accumulate(const Real* from, int64_t n, bool add, Sum* to) {
  if (add) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<Sum>(to[j] + from[j]);
  } else {
    std::copy_n(from, n, to);
  }
}

// What lies between a product and the logit z: z = softcap * tanh((product + bias) / softcap) / T.
struct Transform {
  float softcap;  // 0: none
  float temperature;

  template <typename T>
  void logits(const T* products, const float* bias, int64_t n, float* z) const {
    const float scale = 1.0f / temperature;
    if (bias == nullptr && !(softcap > 0.0f)) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = load(products[j]) * scale;
      return;
    }
    if (bias != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = load(products[j]) + bias[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = load(products[j]);
    }
    if (softcap > 0.0f) {
      const float inverse = 1.0f / softcap;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = softcap * tanh_vec(z[j] * inverse);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] *= scale;
  }

  // From the gradient with respect to z to the one with respect to the product, in place.
  void chain(const float* z, int64_t n, float* dz) const {
    const float scale = 1.0f / temperature;
    if (softcap > 0.0f) {
      const float to_tanh = temperature / softcap;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float tanh = z[j] * to_tanh;
        dz[j] *= scale * (1.0f - tanh * tanh);
      }
    } else if (scale != 1.0f) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) dz[j] *= scale;
    }
  }
};

// Which of a row's sums are made: sum_exp; weighted_sum too; square_sum and logit_sum too. The
// value is how many.
enum Sums { kSumExp = 1, kEntropy = 2, kAllSums = 4 };

// The running state of one row. Of exp(z - row_max), `sum_exp` is the sum, `weighted_sum` the sum
// of its products with z - row_max, `square_sum` that of its squares; `logit_sum` is the sum of z.
struct State {
  float row_max = -kInfinity, sum_exp = 0.0f, weighted_sum = 0.0f, square_sum = 0.0f,
        logit_sum = 0.0f;

  void add(const float* z, int64_t n, Sums sums) {
    const float largest = latro::largest(z, n, row_max);
    // A row that is -inf so far has no maximum to subtract.
    const float shift = largest == -kInfinity ? 0.0f : largest;
    const float drop = row_max - shift;
    const float shrink = std::exp(drop);
    State added;  // of these n logits, under the new maximum
    for (int64_t begin = 0; begin < n; begin += kStretch) {
      const int64_t end = std::min(begin + kStretch, n);
      float exps = 0.0f, products = 0.0f, squares = 0.0f, logits = 0.0f;
      if (sums == kAllSums) {
#pragma omp simd reduction(+ : exps, products, squares, logits)
        for (int64_t j = begin; j < end; ++j) {
          const float distance = z[j] - shift;
          const float e = exp_vec(distance);
          exps += e;
          products += e == 0.0f ? 0.0f : e * distance;  // 0 * -inf counts as 0
          squares += e * e;
          logits += z[j];
        }
      } else if (sums == kEntropy) {
#pragma omp simd reduction(+ : exps, products)
        for (int64_t j = begin; j < end; ++j) {
          const float distance = z[j] - shift;
          const float e = exp_vec(distance);
          exps += e;
          products += e == 0.0f ? 0.0f : e * distance;
        }
      } else {
#pragma omp simd reduction(+ : exps)
        for (int64_t j = begin; j < end; ++j) exps += exp_vec(z[j] - shift);
      }
      added.sum_exp += exps;
      added.weighted_sum += products;
      added.square_sum += squares;
      added.logit_sum += logits;
    }
    if (sums >= kEntropy) {
      if (shrink == 0.0f) {
        weighted_sum = added.weighted_sum;
      } else {
        weighted_sum = shrink * (weighted_sum + drop * sum_exp) + added.weighted_sum;
      }
    }
    if (sums == kAllSums) {
      square_sum = square_sum * (shrink * shrink) + added.square_sum;
      logit_sum += added.logit_sum;
    }
    sum_exp = sum_exp * shrink + added.sum_exp;
    row_max = largest;
  }
};

// What the backward knows of one row; the formulas stand in latro_kernels/row_statistics.
struct RowGrad {
  float grad_logp, grad_entropy;  // upstream
  float logp, offset, grad_square, row_max, log_sum;
  bool has_offset;  // else grad_entropy, offset and grad_square are 0

  bool is_zero() const {
    return grad_logp == 0.0f && grad_entropy == 0.0f && offset == 0.0f && grad_square == 0.0f;
  }

  // The gradient with respect to n logits z; `hit` is the target's place, anywhere outside 0 .. n
  // where it is not among them.
  void logits(const float* z, int64_t n, int64_t hit, float* dz) const {
    const float g = grad_logp, h = grad_entropy, r = grad_square;
    const float shift = row_max, log_of_sum = log_sum;
    if (has_offset) {
      const float constant = g + offset;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float log_p = (z[j] - shift) - log_of_sum;
        const float p = exp_vec(log_p);
        dz[j] = p == 0.0f ? 0.0f : -p * (constant + h * log_p - r * p);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) dz[j] = -g * exp_vec((z[j] - shift) - log_of_sum);
    }
    if (hit >= 0 && hit < n) {
      // 1 - p by expm1 of the log-prob that the forward kept: exact where p is close to 1.
      dz[hit] = -g * std::expm1(logp);
      const float p = std::exp(logp);
      if (p > 0.0f) dz[hit] -= p * (h * logp + offset - r * p);  // 0 * -inf counts as 0
    }
  }
};

// The same of every row, by its number; the arrays from grad_entropy to grad_square may be null.
struct RowGradArrays {
  const float *grad_logp, *grad_entropy, *logp, *offset, *grad_square, *row_max, *log_sum;

  RowGrad row(int64_t i) const {
    const auto at = [i](const float* rows) { return rows != nullptr ? rows[i] : 0.0f; };
    return {grad_logp[i],    at(grad_entropy), logp[i],    at(offset),
            at(grad_square), row_max[i],       log_sum[i], offset != nullptr};
  }
};

}  // namespace latro

#endif  // LATRO_CPU_SOFTMAX_H_
