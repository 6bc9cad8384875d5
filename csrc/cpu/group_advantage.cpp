// group_advantage on the CPU: sums per sequence, leave-one-out per group, a coefficient per row.
//
// A sequence is summed by one thread in a fixed order, in double, so the result does not depend on
// the number of threads. The formulas stand in latro_kernels/group_advantage.py.

#include <cmath>
#include <cstring>
#include <limits>

#include "latro.h"

namespace {

// Below this many rows, waking the other threads costs more than the work.
constexpr int64_t kParallelRows = 1 << 14;

// exp(d) - 1, relative error about 1e-13: d = n·ln2 + r gives 2^n·(1 + expm1(r)) - 1. No branch and
// no call, so that the loops over rows vectorise, which those over std::expm1 do not. NaN stays
// NaN, and what exceeds a double (d > 709) exceeds the float it is stored to all the same.
inline double expm1_vectorised(double d) {
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
  double power;  // 2^n
  std::memcpy(&power, &bits, sizeof power);
  return power * p + (power - 1.0);
}

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
    total += expm1_vectorised(d) - d;
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

int32_t latro_cpu_group_advantage_forward(const float* logp, const float* ref_logp,
                                          const float* row_kl, const int64_t* offsets,
                                          const uint8_t* finished, float* reward,
                                          float* answer_logp, float* rationale_logp, float* kl,
                                          float* advantage, float* coefficient, double* rewards,
                                          int64_t G, int64_t K, double scale, double beta,
                                          double answer_weight, int32_t kl_in_loss,
                                          int32_t exclude_unfinished, int64_t threads) {
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
        divergence = kl_in_loss ? sum_k3(logp, ref_logp, begin, middle)
                                : sum_log_ratio(logp, ref_logp, begin, middle);
      } else if (row_kl != nullptr) {
        divergence = sum(row_kl, begin, middle);
      }
      answer_logp[s] = static_cast<float>(answer);
      rationale_logp[s] = static_cast<float>(sum(logp, begin, middle));
      kl[s] = static_cast<float>(divergence);
      rewards[s] = kl_in_loss ? answer : answer - beta * divergence;
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
      if (kl_in_loss && ref_logp != nullptr) {
        const double pull = -scale * beta;
#pragma omp simd
        for (int64_t i = begin; i < middle; ++i) {
          const double d = static_cast<double>(ref_logp[i]) - static_cast<double>(logp[i]);
          coefficient[i] = static_cast<float>(weight + pull * expm1_vectorised(d));
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
