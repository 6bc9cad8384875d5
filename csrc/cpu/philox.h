// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random
// words as a function of a counter and a key, for 16 neighbouring counters at a time, and the
// Gumbel variate that is made of a word. latro_kernels/linear_sample/noise.py says the same in
// PyTorch.
#ifndef LATRO_CPU_PHILOX_H_
#define LATRO_CPU_PHILOX_H_

#include <cmath>
#include <cstdint>

#include "vector_math.h"

namespace latro {

constexpr int64_t kCounters = 16;
// Columns of the vocabulary that so many counters serve: each gives four words.
constexpr int64_t kNoiseCols = 4 * kCounters;

// The generator of one row.
struct Philox {
  uint64_t key, position;

  Philox(int64_t seed, int64_t position)
      : key(static_cast<uint64_t>(seed)), position(static_cast<uint64_t>(position)) {}

  // words[w][i] = word w of counter (first + i, position's low and high word, 0).
  void words(uint32_t first, uint32_t words[4][kCounters]) const {
    // Words stand in the lower halves of lanes of 64 bits, where a product finds them; what is in
    // the upper halves is never read.
    uint64_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    for (int64_t i = 0; i < kCounters; ++i) {
      c0[i] = first + static_cast<uint32_t>(i);
      c1[i] = position;
      c2[i] = position >> 32;
      c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
      for (int64_t i = 0; i < kCounters; ++i) {
        const uint64_t of_c0 = (c0[i] & 0xffffffffu) * 0xD2511F53u;
        const uint64_t of_c2 = (c2[i] & 0xffffffffu) * 0xCD9E8D57u;
        c0[i] = (of_c2 >> 32) ^ c1[i] ^ k0;
        c1[i] = of_c2;
        c2[i] = (of_c0 >> 32) ^ c3[i] ^ k1;
        c3[i] = of_c0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
#pragma omp simd
    for (int64_t i = 0; i < kCounters; ++i) {
      words[0][i] = static_cast<uint32_t>(c0[i]);
      words[1][i] = static_cast<uint32_t>(c1[i]);
      words[2][i] = static_cast<uint32_t>(c2[i]);
      words[3][i] = static_cast<uint32_t>(c3[i]);
    }
  }
};

// A uniform number of (0, 1): word + 1/2 in units of 2^-32.
inline float uniform(uint32_t word) {
  const float v = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  return v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
}

// -log(-log(1 - v)), rounded once.
inline float gumbel(uint32_t word) {
  return static_cast<float>(-std::log(-std::log1p(-static_cast<double>(uniform(word)))));
}

// What no Gumbel variate exceeds: that of the word 0 is 33 log 2 = 22.874.
constexpr float kMaxGumbel = 22.875f;

// A number that a word's Gumbel variate does not exceed, and is below by 0.06 where it is large.
// -log(-log(1 - v)) is at most -log(v). The bits of a float, as an integer, are a logarithm in
// straight pieces, which is nowhere above the true one.
inline float gumbel_bound(uint32_t word) {
  constexpr float kLog2 = 0.693147181f, kRounding = 1e-4f;
  const float log2_v = static_cast<float>(bits_of(uniform(word))) * 0x1p-23f - 127.0f;
  return kRounding - kLog2 * log2_v;
}

}  // namespace latro

#endif  // LATRO_CPU_PHILOX_H_
