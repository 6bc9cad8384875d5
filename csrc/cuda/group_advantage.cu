// group_advantage on CUDA: one launch, one block a group, a warp at a time on a sequence.
//
// Every warp works the group's baseline out for itself from the rewards in global scratch: K
// numbers are few, and it leaves one barrier and no limit on K. All arithmetic is double: the
// kernel moves little data, and rewards may be large and close together. The formulas stand in
// latro_kernels/group_advantage.py.

#include <cuda_runtime.h>

#include <cstdint>

#include "latro.h"

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Problem {
  const float* logp;
  const float* ref_logp;
  const float* row_kl;
  const int64_t* offsets;
  const uint8_t* finished;
  float* reward;
  float* answer_logp;
  float* rationale_logp;
  float* kl;
  float* advantage;
  float* coefficient;
  double* rewards;
  int64_t K;
  double scale;
  double beta;
  double answer_weight;
  bool kl_in_loss;
  bool exclude_unfinished;
};

__device__ double warp_sum(double x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// NaN if either is: fmin would drop it, and with it the sign that a log-probability went wrong.
__device__ double lower(double a, double b) { return a < b || isnan(a) ? a : b; }

__device__ double warp_lowest(double x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = lower(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

__device__ bool is_unfinished(const Problem& p, int64_t s) {
  return p.finished != nullptr && !p.finished[s];
}

// Sums of sequence s, each lane over every 32nd row; lane 0 writes them.
__device__ void sum_sequence(const Problem& p, int64_t s, int lane) {
  const int64_t begin = p.offsets[2 * s], middle = p.offsets[2 * s + 1];
  const int64_t end = p.offsets[2 * s + 2];
  double rationale = 0.0, divergence = 0.0, answer = 0.0;
  for (int64_t i = begin + lane; i < middle; i += kLanes) {
    const double logp = p.logp[i];
    rationale += logp;
    if (p.ref_logp != nullptr) {
      const double d = p.ref_logp[i] - logp;
      divergence += p.kl_in_loss ? expm1(d) - d : -d;
    } else if (p.row_kl != nullptr) {
      divergence += p.row_kl[i];
    }
  }
  for (int64_t i = middle + lane; i < end; i += kLanes) answer += p.logp[i];
  rationale = warp_sum(rationale);
  divergence = warp_sum(divergence);
  answer = warp_sum(answer);
  if (lane == 0) {
    p.rationale_logp[s] = static_cast<float>(rationale);
    p.kl[s] = static_cast<float>(divergence);
    p.answer_logp[s] = static_cast<float>(answer);
    p.rewards[s] = p.kl_in_loss ? answer : answer - p.beta * divergence;
  }
}

__device__ void write_coefficients(const Problem& p, int64_t s, double advantage, int lane) {
  const int64_t begin = p.offsets[2 * s], middle = p.offsets[2 * s + 1];
  const int64_t end = p.offsets[2 * s + 2];
  for (int64_t i = begin + lane; i < middle; i += kLanes) {
    double weight = advantage;
    if (p.kl_in_loss && p.ref_logp != nullptr) {
      weight += p.beta * expm1(static_cast<double>(p.ref_logp[i]) - p.logp[i]);
    }
    p.coefficient[i] = static_cast<float>(-p.scale * weight);
  }
  const auto answer = static_cast<float>(-p.scale * p.answer_weight);
  for (int64_t i = middle + lane; i < end; i += kLanes) p.coefficient[i] = answer;
}

__global__ void __launch_bounds__(kWarps* kLanes) group_advantage_kernel(Problem p) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t first = blockIdx.x * p.K;
  for (int64_t k = warp; k < p.K; k += kWarps) sum_sequence(p, first + k, lane);
  __syncthreads();

  double lowest = __longlong_as_double(0x7ff0000000000000);  // +inf
  double members = 0.0;
  for (int64_t k = lane; k < p.K; k += kLanes) {
    if (p.exclude_unfinished && is_unfinished(p, first + k)) continue;
    lowest = lower(p.rewards[first + k], lowest);
    members += 1.0;
  }
  lowest = warp_lowest(lowest);
  members = warp_sum(members);
  // Rewards are centred on the lowest one, so that equal rewards give exactly 0. An unfinished
  // sequence adds nothing: it is left out, or it has the lowest reward.
  double excess = 0.0;
  for (int64_t k = lane; k < p.K; k += kLanes) {
    if (!is_unfinished(p, first + k)) excess += p.rewards[first + k] - lowest;
  }
  excess = warp_sum(excess);

  for (int64_t k = warp; k < p.K; k += kWarps) {
    const int64_t s = first + k;
    const bool unfinished = is_unfinished(p, s);
    const bool excluded = unfinished && p.exclude_unfinished;
    const double reward = unfinished && !excluded ? lowest : p.rewards[s];
    const double advantage =
        excluded || members < 2.0 ? 0.0 : (members * (reward - lowest) - excess) / (members - 1.0);
    if (lane == 0) {
      p.reward[s] = static_cast<float>(reward);
      p.advantage[s] = static_cast<float>(advantage);
    }
    if (excluded) {
      for (int64_t i = p.offsets[2 * s] + lane; i < p.offsets[2 * s + 2]; i += kLanes) {
        p.coefficient[i] = 0.0f;
      }
    } else {
      write_coefficients(p, s, advantage, lane);
    }
  }
}

}  // namespace

int32_t latro_cuda_group_advantage_forward(const float* logp, const float* ref_logp,
                                           const float* row_kl, const int64_t* offsets,
                                           const uint8_t* finished, float* reward,
                                           float* answer_logp, float* rationale_logp, float* kl,
                                           float* advantage, float* coefficient, double* rewards,
                                           int64_t G, int64_t K, double scale, double beta,
                                           double answer_weight, int32_t kl_in_loss,
                                           int32_t exclude_unfinished, void* stream) {
  if (G == 0) return cudaSuccess;
  const Problem problem{
      logp,        ref_logp,       row_kl, offsets,       finished,        reward,
      answer_logp, rationale_logp, kl,     advantage,     coefficient,     rewards,
      K,           scale,          beta,   answer_weight, kl_in_loss != 0, exclude_unfinished != 0};
  group_advantage_kernel<<<static_cast<unsigned>(G), kWarps * kLanes, 0,
                           static_cast<cudaStream_t>(stream)>>>(problem);
  return cudaGetLastError();
}
