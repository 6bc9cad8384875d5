// The matrix products of the CPU backend, as pieces: two operands are packed into panels, and a
// kernel multiplies one panel of each into a small block of the result, in registers.
//
// A panel of A holds kRows of its vectors, a panel of B kCols, and both run along the depth k, the
// index that is summed over, in words: one float, or two neighbouring k in bf16. Word (k, i) of a
// panel of B stands at k * kCols + i; of A it does so too, unless the Gemm says otherwise (a_word).
// There is no copy of a whole matrix: callers pack as much as they are about to use.
//
// Each entry of a block is summed in the same order whatever stands beside it. A row of a result
// depends on that row alone, not on the other rows, their number or the threads.
#ifndef LATRO_CPU_GEMM_H_
#define LATRO_CPU_GEMM_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include "vector_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LATRO_HAS_AVX512_BF16 1
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace latro {

constexpr int64_t kAlign = 64;
// Words in a line of the cache.
constexpr int64_t kLineWords = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// sum + a * b. It is rounded once where the processor can do so: the compiler, left to choose, may
// take two operations for one loop and one for another, whose bits then differ.
template <typename Vector>
Vector add_product(Vector sum, float a, Vector b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64) {
    return reinterpret_cast<Vector>(_mm512_fmadd_ps(_mm512_set1_ps(a), reinterpret_cast<__m512>(b),
                                                    reinterpret_cast<__m512>(sum)));
  }
#endif
#if defined(__FMA__)
  if constexpr (sizeof(Vector) == 32) {
    return reinterpret_cast<Vector>(_mm256_fmadd_ps(_mm256_set1_ps(a), reinterpret_cast<__m256>(b),
                                                    reinterpret_cast<__m256>(sum)));
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(Vector) == 16) {
    return reinterpret_cast<Vector>(
        vfmaq_n_f32(reinterpret_cast<float32x4_t>(sum), reinterpret_cast<float32x4_t>(b), a));
  }
#endif
  return sum + a * b;
}

// What Gemms of vector instructions have in common.
struct VectorGemm {
  // The depth of a panel is a multiple of so many words.
  static constexpr int64_t kStep = 1;
  // One sum in fp32 over a longer depth, in words, loses digits that sums of parts keep.
  static constexpr int64_t kMaxDepth = 128;
  // Rows that a filter leaves out together, or not.
  static constexpr int64_t kFilterRows = 12;
  // Of few_rows.h. Columns that are multiplied at once: so many lines of the cache where the
  // weight's rows lie a power of two apart share one set of the first-level cache.
  static constexpr int64_t kFewColumns = 8;
  // Rows in the narrowest and the widest panel of hidden; one is a power of two times the other. A
  // wide one is a vector of 512 bits. Where vectors are shorter all are narrow: eight columns of
  // sixteen rows would take more registers than there are, and fewer columns read the panel more
  // often.
  static constexpr int64_t kNarrowPanel = 8;
#if defined(__AVX512F__)
  static constexpr int64_t kWidePanel = 16;
#else
  static constexpr int64_t kWidePanel = kNarrowPanel;
#endif

  // What a thread needs as long as it multiplies.
  struct Session {
    Session() {}
  };
};

// Products in fp32. The vectors are the compiler's own, so that one text serves AVX-512, AVX2 and
// NEON; the block of the result and one row of B fill the registers that there are.
struct Fp32Gemm : VectorGemm {
  using Element = float;
  using Word = float;
  using Product = float;
#if defined(__AVX512F__)
  static constexpr int64_t kLanes = 16, kRows = 12;
#elif defined(__AVX__)
  static constexpr int64_t kLanes = 8, kRows = 6;
#elif defined(__aarch64__)
  static constexpr int64_t kLanes = 4, kRows = 12;
#else
  static constexpr int64_t kLanes = 4, kRows = 6;
#endif
  static constexpr int64_t kCols = 2 * kLanes;
  static constexpr int64_t kPerWord = 1;
#if defined(__AVX512F__)
  // Two vectors, for which there are registers: a word of the weight is read once for both.
  static constexpr int64_t kWidePanel = 2 * kLanes;
#endif

  static Word word(float low, float) { return low; }
  static int64_t a_word(int64_t k, int64_t i) { return k * kRows + i; }

  // c[kRows][kCols] = a . b, or += with `add`; row i of c at i * c_step.
  static void multiply(const Word* a, const Word* b, int64_t depth, float* c, int64_t c_step,
                       bool add) {
    typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
    Vector sum[kRows][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector b0, b1;
      std::memcpy(&b0, b + k * kCols, sizeof b0);
      std::memcpy(&b1, b + k * kCols + kLanes, sizeof b1);
#pragma GCC unroll 12
      for (int64_t i = 0; i < kRows; ++i) {
        sum[i][0] = add_product(sum[i][0], a[k * kRows + i], b0);
        sum[i][1] = add_product(sum[i][1], a[k * kRows + i], b1);
      }
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        float* to = c + i * c_step + half * kLanes;
        Vector before = {};
        if (add) std::memcpy(&before, to, sizeof before);
        before += sum[i][half];
        std::memcpy(to, &before, sizeof before);
      }
    }
  }
};

// Products in double, for where they are few and take less time than what is done with them.
struct Fp64Gemm : VectorGemm {
  using Element = double;
  using Word = double;
  using Product = double;
  static constexpr int64_t kRows = Fp32Gemm::kRows, kCols = Fp32Gemm::kCols;
  static constexpr int64_t kPerWord = 1;

  static Word word(double low, double) { return low; }
  static int64_t a_word(int64_t k, int64_t i) { return k * kRows + i; }

  static void multiply(const Word* a, const Word* b, int64_t depth, double* c, int64_t c_step,
                       bool add) {
    for (int64_t i = 0; i < kRows; ++i) {
      double sum[kCols] = {};
      for (int64_t k = 0; k < depth; ++k) {
#pragma omp simd
        for (int64_t j = 0; j < kCols; ++j) sum[j] += a[k * kRows + i] * b[k * kCols + j];
      }
      for (int64_t j = 0; j < kCols; ++j)
        c[i * c_step + j] = sum[j] + (add ? c[i * c_step + j] : 0.0);
    }
  }
};

inline uint32_t bf16_pair(bfloat16 low, bfloat16 high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

#ifdef LATRO_HAS_AVX512_BF16
// Products of bf16 with sums in fp32, for processors that have them (`bf16_gemm_supported`).
struct Bf16Gemm : VectorGemm {
  using Element = bfloat16;
  using Word = uint32_t;
  using Product = float;
  static constexpr int64_t kRows = 12, kCols = 32;
  static constexpr int64_t kPerWord = 2;

  static Word word(bfloat16 low, bfloat16 high) { return bf16_pair(low, high); }
  static int64_t a_word(int64_t k, int64_t i) { return k * kRows + i; }

  __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static void multiply(
      const Word* a, const Word* b, int64_t depth, float* c, int64_t c_step, bool add) {
    __m512 sum[kRows][2];
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; ++k) {
      const auto b0 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + k * kCols));
      const auto b1 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + k * kCols + 16));
#pragma GCC unroll 12
      for (int64_t i = 0; i < kRows; ++i) {
        const auto one =
            reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[k * kRows + i])));
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], one, b0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], one, b1);
      }
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) {
      float* to = c + i * c_step;
      if (add) {
        sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_loadu_ps(to));
        sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_loadu_ps(to + 16));
      }
      _mm512_storeu_ps(to, sum[i][0]);
      _mm512_storeu_ps(to + 16, sum[i][1]);
    }
  }
};
#endif

inline bool bf16_gemm_supported() {
#ifdef LATRO_HAS_AVX512_BF16
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// c[kRows][kCols] = a . b, or += with `add`, over any depth.
template <typename Gemm>
void multiply(const typename Gemm::Word* a, const typename Gemm::Word* b, int64_t depth,
              typename Gemm::Product* c, int64_t c_step, bool add) {
  for (int64_t k = 0; k < depth; k += Gemm::kMaxDepth) {
    const int64_t some = std::min(depth - k, Gemm::kMaxDepth);
    Gemm::multiply(a + k * Gemm::kRows, b + k * Gemm::kCols, some, c, c_step, add || k > 0);
  }
}

// Uninitialised memory for `count` of T, aligned for panels; null where there is none to be had.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Room = std::unique_ptr<T[], Free>;
template <typename T>
Room<T> room(int64_t count) {
  const int64_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlign) * kAlign;
  return Room<T>(static_cast<T*>(std::aligned_alloc(kAlign, bytes > 0 ? bytes : kAlign)));
}

}  // namespace latro

#endif  // LATRO_CPU_GEMM_H_
