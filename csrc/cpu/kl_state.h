// The running state of a row of linear_kl: both heads' sums of exponentials, and the mean of their
// difference. The formulas stand in latro_kernels/linear_kl.
#ifndef LATRO_CPU_KL_STATE_H_
#define LATRO_CPU_KL_STATE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "softmax.h"
#include "vector_math.h"

namespace latro {

// All of it is double: a KL is a small difference of large sums.
struct KlState {
  double max_p = -kInfinity, max_q = -kInfinity;
  double anchor = 0.0;  // zq where zp is max_p; any number where that is -inf
  double sum_exp_p = 0.0, sum_exp_q = 0.0;
  double moment = 0.0;  // sum of exp(zp - max_p) * (zp - zq - distance())

  // zp - zq in the column of max_p.
  double distance() const { return max_p - anchor; }

  void add(const double* zp, const double* zq, int64_t n) {
    raise_q(largest(zq, n, max_q));
    const double largest_p = largest(zp, n, max_p);
    if (largest_p > max_p) raise_p(largest_p, zq[std::find(zp, zp + n, largest_p) - zp]);
    // A row that is -inf so far has no maximum to subtract.
    const double shift_p = max_p == -kInfinity ? 0.0 : max_p;
    const double shift_q = max_q == -kInfinity ? 0.0 : max_q;
    const double from = shift_p - anchor;
    double sum_p = 0.0, sum_q = 0.0, sum_moment = 0.0;
#pragma omp simd reduction(+ : sum_p, sum_q, sum_moment)
    for (int64_t j = 0; j < n; ++j) {
      const double ep = exp_vec(zp[j] - shift_p);
      sum_p += ep;
      sum_q += exp_vec(zq[j] - shift_q);
      sum_moment += ep == 0.0 ? 0.0 : ep * ((zp[j] - zq[j]) - from);  // 0 * inf counts as 0
    }
    sum_exp_p += sum_p;
    sum_exp_q += sum_q;
    moment += sum_moment;
  }

  // What was summed so far, seen from a maximum that lies at or above the one of before.
  void raise_q(double largest) {
    if (largest == max_q) return;
    sum_exp_q *= exp_vec(max_q - largest);
    max_q = largest;
  }
  void raise_p(double largest, double q) {
    const double before = distance(), shrink = exp_vec(max_p - largest);
    max_p = largest;
    anchor = q == -kInfinity ? 0.0 : q;
    moment = shrink == 0.0 ? 0.0 : shrink * (moment + (before - distance()) * sum_exp_p);
    sum_exp_p *= shrink;
  }

  // E_p[zp - zq], less its value in the column of max_p.
  double mean() const { return moment / sum_exp_p; }

  double kl() const {
    // E_p[zp - zq] less the logarithms' difference, in terms that are 0 where the heads are equal.
    const double kl = mean() + (max_q - anchor) + std::log(sum_exp_q / sum_exp_p);
    return kl < 0.0 ? 0.0 : kl;
  }
};

}  // namespace latro

#endif  // LATRO_CPU_KL_STATE_H_
