// linear_sample on CUDA: the column of a tile of logits that has the highest score, a logit and its
// noise. The products around it are cuBLAS's, in fp32, and linear_logprob folds them. Blocks share
// a row's columns out between them, so that few rows keep a whole chip busy.
#include <cstdint>

#include "latro.h"
#include "softmax.cuh"

namespace {

using latro::kAllLanes;
using latro::kInfinity;
using latro::kThreads;
using latro::kWarps;
using latro::Pack;
using latro::Transform;

constexpr int kWords = 4;  // of a counter, each for a column
constexpr int kCounters = LATRO_SAMPLE_PART_COLS / (kWords * kThreads);  // of a thread
static_assert(kCounters * kWords * kThreads == LATRO_SAMPLE_PART_COLS, "a part is a block's work");

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as
// latro_kernels/linear_sample/noise.py has it: counter (first word, position, 0), key seed.
__device__ void philox(uint32_t counter, uint64_t position, uint64_t seed,
                       uint32_t (&words)[kWords]) {
  uint32_t c0 = counter, c1 = static_cast<uint32_t>(position);
  uint32_t c2 = static_cast<uint32_t>(position >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t of_c0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t of_c2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(of_c2 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(of_c2);
    c2 = static_cast<uint32_t>(of_c0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(of_c0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The standard Gumbel variate of a word, -log(-log(1 - v)) with v = (word + 1/2) / 2^32 in fp32.
__device__ float gumbel(uint32_t word) {
  const float v = fminf(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.0f - 0x1p-24f);
  return -logf(-log1pf(-v));
}

// A column and its score; of equal scores the lower column's is better, and NaN is never.
struct Candidate {
  float score = -kInfinity;
  int64_t column = 0;

  __device__ void take(float other_score, int64_t other_column) {
    if (other_score > score || (other_score == score && other_column < column)) {
      score = other_score;
      column = other_column;
    }
  }
};

__device__ Candidate best_of_warp(Candidate best) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, best.score, offset);
    const int64_t column = __shfl_xor_sync(kAllLanes, best.column, offset);
    best.take(score, column);
  }
  return best;
}

// The best of a block's threads; right in the first warp.
__device__ Candidate best_of_block(Candidate best) {
  __shared__ float scores[kWarps];
  __shared__ int64_t columns[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  best = best_of_warp(best);
  if (lane == 0) {
    scores[warp] = best.score;
    columns[warp] = best.column;
  }
  __syncthreads();
  const int other = lane < kWarps ? lane : 0;
  best.score = scores[other];
  best.column = columns[other];
  return best_of_warp(best);
}

// Block (p, i) draws from part p of row i of the tile. A thread takes columns by the counter: four,
// of which the first and last counter of a row may have fewer.
template <bool kGreedy>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(const float* tile, const float* bias, const int64_t* seed, const int64_t* position,
                const int64_t* first, float* part_score, int64_t* part_column, int64_t rows,
                int64_t cols, int64_t first_col, Transform transform) {
  const int64_t i = blockIdx.y;
  const float* row = tile + i * cols;
  // The number of the tile's first column in the whole vocabulary, and the counter that it has.
  const int64_t number = (first == nullptr ? 0 : *first) + first_col;
  const int64_t first_counter = number / kWords + blockIdx.x * (kCounters * kThreads);
  Candidate best;
#pragma unroll
  for (int n = 0; n < kCounters; ++n) {
    const int64_t counter = first_counter + n * kThreads + threadIdx.x;
    const int64_t j = counter * kWords - number;
    if (j >= cols) break;
    float z[kWords];
    for (int k = 0; k < kWords; ++k) {
      const bool is_column = j + k >= 0 && j + k < cols;
      z[k] = is_column ? row[j + k] : 0.0f;
      if (is_column && bias != nullptr) z[k] += bias[j + k];
    }
    transform.logits(z);
    uint32_t words[kWords];
    if (!kGreedy) philox(static_cast<uint32_t>(counter), position[i], seed[i], words);
    for (int k = 0; k < kWords; ++k) {
      if (j + k < 0 || j + k >= cols) continue;
      const float score = kGreedy ? z[k] : z[k] + gumbel(words[k]);
      if (score > best.score) best = {score, first_col + j + k};
    }
  }
  best = best_of_block(best);
  if (threadIdx.x == 0) {
    part_score[blockIdx.x * rows + i] = best.score;
    part_column[blockIdx.x * rows + i] = best.column;
  }
}

// A warp takes a row.
__global__ void __launch_bounds__(kThreads)
    choose_kernel(const float* part_score, const int64_t* part_column, float* score, int64_t* token,
                  int64_t rows, int64_t parts) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (i >= rows) return;
  const int lane = threadIdx.x % 32;
  Candidate best;
  for (int64_t p = lane; p < parts; p += 32) {
    best.take(part_score[p * rows + i], part_column[p * rows + i]);
  }
  best = best_of_warp(best);
  if (lane == 0 && best.score > score[i]) {
    score[i] = best.score;
    token[i] = best.column;
  }
}

}  // namespace

int32_t latro_cuda_linear_sample_draw(const float* tile, const float* bias, const int64_t* seed,
                                      const int64_t* position, const int64_t* first, int32_t greedy,
                                      float* score, int64_t* token, float* part_score,
                                      int64_t* part_column, int64_t rows, int64_t cols,
                                      int64_t first_col, float softcap, float temperature,
                                      void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t parts = (cols + kWords - 1) / LATRO_SAMPLE_PART_COLS + 1;
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(rows));
  auto* kernel = greedy != 0 ? draw_kernel<true> : draw_kernel<false>;
  kernel<<<grid, kThreads, 0, on>>>(tile, bias, seed, position, first, part_score, part_column,
                                    rows, cols, first_col, Transform{softcap, temperature});
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  choose_kernel<<<blocks, kThreads, 0, on>>>(part_score, part_column, score, token, rows, parts);
  return cudaGetLastError();
}
