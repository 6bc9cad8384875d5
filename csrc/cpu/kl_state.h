// The running state of a row of linear_kl: both heads' sums of exponentials, and the first and
// second order of their difference. The formulas stand in latro_kernels/linear_kl.py.
#ifndef LATRO_CPU_KL_STATE_H_
#define LATRO_CPU_KL_STATE_H_

#include <cmath>
#include <cstdint>

#include "softmax.h"
#include "vector_math.h"

namespace latro {

// exp(-x) - 1 + x, by Taylor's series where the formula would cancel.
inline float second_order(float x) {
  float series = 1.0f - x * (1.0f / 8);
  series = 1.0f - x * (1.0f / 7) * series;
  series = 1.0f - x * (1.0f / 6) * series;
  series = 1.0f - x * (1.0f / 5) * series;
  series = 1.0f - x * (1.0f / 4) * series;
  series = 1.0f - x * (1.0f / 3) * series;
  return 0.5f * x * x * series;
}
constexpr float kClose = 0.5f;  // the next term of the series is under 2^-24 there

constexpr int64_t kKlStretch = 48;

struct KlState {
  float peak_p = -kInfinity, peak_q = -kInfinity;
  float total_p = 0.0f, total_q = 0.0f, first = 0.0f, second = 0.0f;

  void add(const float* zp, const float* zq, int64_t n) {
    const float largest_p = largest(zp, n, peak_p);
    const float largest_q = largest(zq, n, peak_q);
    // A row that is -inf so far has no peak to subtract.
    const float shift_p = largest_p == -kInfinity ? 0.0f : largest_p;
    const float shift_q = largest_q == -kInfinity ? 0.0f : largest_q;
    rescale(peak_p - shift_p, peak_q - shift_q);
    peak_p = largest_p;
    peak_q = largest_q;
    const float gap = shift_p - shift_q;
    // A KL is a small difference of large sums: few terms a sum in fp32, and these in double.
    double sum_p = total_p, sum_q = total_q, sum_first = first, sum_second = second;
    for (int64_t begin = 0; begin < n; begin += kKlStretch) {
      const int64_t end = std::min(begin + kKlStretch, n);
      float some_p = 0.0f, some_q = 0.0f, some_first = 0.0f, some_second = 0.0f;
#pragma omp simd reduction(+ : some_p, some_q, some_first, some_second)
      for (int64_t j = begin; j < end; ++j) {
        const float ep = exp_vec(zp[j] - shift_p), eq = exp_vec(zq[j] - shift_q);
        const float delta = (zp[j] - zq[j]) - gap;
        const float moment = ep == 0.0f ? 0.0f : ep * delta;  // 0 * inf counts as 0
        some_p += ep;
        some_q += eq;
        some_first += moment;
        some_second += std::fabs(delta) < kClose ? ep * second_order(delta) : (eq - ep) + moment;
      }
      sum_p += some_p;
      sum_q += some_q;
      sum_first += some_first;
      sum_second += some_second;
    }
    total_p = static_cast<float>(sum_p);
    total_q = static_cast<float>(sum_q);
    first = static_cast<float>(sum_first);
    second = static_cast<float>(sum_second);
  }

  // What was summed so far, seen from peaks that lie higher by -drop.
  void rescale(float drop_p, float drop_q) {
    if (drop_p == 0.0f && drop_q == 0.0f) return;
    const float shrink_p = std::exp(drop_p), shrink_q = std::exp(drop_q);
    const float turn = drop_p - drop_q;
    const float moved = shrink_p == 0.0f ? 0.0f : shrink_p * (first + turn * total_p);
    if (std::fabs(turn) < kClose) {
      const float bend = second_order(turn) * (total_p - first) + turn * first;
      second = shrink_q * second + shrink_p * bend;
    } else {
      second = (shrink_q * total_q - shrink_p * total_p) + moved;
    }
    first = moved;
    total_p *= shrink_p;
    total_q *= shrink_q;
  }

  // E_p[zp - zq].
  float center() const { return (peak_p - peak_q) + first / total_p; }

  float kl() const {
    const double total = total_p, mean = first / total, excess = (second - double{first}) / total;
    // The sum of exp(zq - peak_q) over that of p is 1 + excess; both sums where that cancels.
    return static_cast<float>(mean +
                              (excess > -0.5 ? std::log1p(excess) : std::log(total_q / total)));
  }
};

}  // namespace latro

#endif  // LATRO_CPU_KL_STATE_H_
