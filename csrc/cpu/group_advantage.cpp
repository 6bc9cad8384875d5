// group_advantage on the CPU: sums per sequence, leave-one-out per group, a coefficient per row.
//
// A sequence is summed by one thread in a fixed order, in double, so the result does not depend on
// the number of threads. The formulas stand in latro_kernels/group_advantage.

#include <cmath>
#include <limits>

#include "latro.h"
#include "vector_math.h"

namespace {

// Below this many rows, waking the other threads costs more than the work.
constexpr int64_t kParallelRows = 1 << 14;

double sum(const float* x, int64_t begin, int64_t end) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) total += x[i];
  return total;
}

double sum_log_ratio(const float* logp, const float* ref_logp, int64_t begin, int64_t end) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) {
    total += static_cast<double>(logp[i]) - static_cast<double>(ref_logp[i]);
  }
  return total;
}

double sum_k3(const float* logp, const float* ref_logp, int64_t begin, int64_t end) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) {
    const double d = static_cast<double>(ref_logp[i]) - static_cast<double>(logp[i]);
    total += latro::expm1_vec(d) - d;
  }
  return total;
}

// The lowest included reward of a group (NaN if one is NaN), and what the baseline needs.
struct Baseline {
  double lowest = std::numeric_limits<double>::infinity();
  double excess = 0.0;  // sum of reward - lowest
  int64_t members = 0;

  // Rewards are centred on the lowest one: they may be large and close together, and equal ones
  // have to give exactly 0.
  double advantage(double reward) const {
    if (members < 2) return 0.0;
    const auto m = static_cast<double>(members);
    return (m * (reward - lowest) - excess) / (m - 1.0);
  }
};

Baseline baseline(double* rewards, const uint8_t* finished, int64_t K, bool exclude) {
  Baseline b;
  const auto unfinished = [&](int64_t k) { return finished != nullptr && !finished[k]; };
  for (int64_t k = 0; k < K; ++k) {
    if (exclude && unfinished(k)) continue;
    ++b.members;
    if (rewards[k] < b.lowest || std::isnan(rewards[k])) b.lowest = rewards[k];
  }
  for (int64_t k = 0; k < K; ++k) {
    if (unfinished(k)) {
      if (exclude) continue;
      rewards[k] = b.lowest;
    }
    b.excess += rewards[k] - b.lowest;
  }
  return b;
}

}  // namespace

int32_t latro_cpu_group_advantage_forward(
    const float* logp, const float* ref_logp, const float* row_kl, const int64_t* offsets,
    const uint8_t* finished, float* reward, float* answer_logp, float* rationale_logp, float* kl,
    float* advantage, float* coefficient, double* rewards, int64_t G, int64_t K, double scale,
    double beta, double answer_weight, int32_t k3, int32_t exclude_unfinished, int64_t threads) {
  const int64_t S = G * K;
  const int team = offsets[2 * S] < kParallelRows ? 1 : static_cast<int>(threads);
  const bool exclude = exclude_unfinished != 0;
#pragma omp parallel num_threads(team)
  {
    // Over sequences rather than groups: an update may have fewer groups than the machine has
    // cores.
#pragma omp for schedule(guided)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t begin = offsets[2 * s], middle = offsets[2 * s + 1], end = offsets[2 * s + 2];
      const double answer = sum(logp, middle, end);
      double divergence = 0.0;
      if (ref_logp != nullptr) {
        divergence = k3 ? sum_k3(logp, ref_logp, begin, middle)
                        : sum_log_ratio(logp, ref_logp, begin, middle);
      } else if (row_kl != nullptr) {
        divergence = sum(row_kl, begin, middle);
      }
      answer_logp[s] = static_cast<float>(answer);
      rationale_logp[s] = static_cast<float>(sum(logp, begin, middle));
      kl[s] = static_cast<float>(divergence);
      // Without weight an infinite KL counts for nothing, and is no NaN.
      rewards[s] = k3 || beta == 0.0 ? answer : answer - beta * divergence;
    }
#pragma omp for schedule(static)
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = g * K;
      const uint8_t* group_finished = finished == nullptr ? nullptr : finished + first;
      const Baseline b = baseline(rewards + first, group_finished, K, exclude);
      for (int64_t s = first; s < first + K; ++s) {
        const bool excluded = exclude && finished != nullptr && !finished[s];
        reward[s] = static_cast<float>(rewards[s]);
        // From here on the scratch holds the advantage, in double for the rows' coefficients.
        rewards[s] = excluded ? 0.0 : b.advantage(rewards[s]);
        advantage[s] = static_cast<float>(rewards[s]);
      }
    }
#pragma omp for schedule(guided)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t begin = offsets[2 * s], middle = offsets[2 * s + 1], end = offsets[2 * s + 2];
      if (exclude && finished != nullptr && !finished[s]) {
        for (int64_t i = begin; i < end; ++i) coefficient[i] = 0.0f;
        continue;
      }
      const double weight = -scale * rewards[s];
      if (k3 && beta != 0.0 && ref_logp != nullptr) {
        const double pull = -scale * beta;
#pragma omp simd
        for (int64_t i = begin; i < middle; ++i) {
          const double d = static_cast<double>(ref_logp[i]) - static_cast<double>(logp[i]);
          coefficient[i] = static_cast<float>(weight + pull * latro::expm1_vec(d));
        }
      } else {
        for (int64_t i = begin; i < middle; ++i) coefficient[i] = static_cast<float>(weight);
      }
      const auto answer = static_cast<float>(-scale * answer_weight);
      for (int64_t i = middle; i < end; ++i) coefficient[i] = answer;
    }
  }
  return LATRO_OK;
}
