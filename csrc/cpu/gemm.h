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
// Words in a line of the cache, and rows fetched before they are packed.
constexpr int64_t kLineWords = 16, kRowsAhead = 16;

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
  // Rows in a panel of hidden; the last panel of few rows is a narrow one. A wide one is a vector
  // of 512 bits. Where vectors are shorter all are narrow: eight columns of sixteen rows would take
  // more registers than there are, and fewer columns read the panel more often.
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

// A matrix with any steps (in elements); `index`, where there is one, names the rows that count.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row_step, col_step;
  const int64_t* index = nullptr;

  const T* row(int64_t i) const { return data + (index != nullptr ? index[i] : i) * row_step; }
};

template <typename Element, typename T>
Element convert(T value) {
  if constexpr (std::is_same_v<Element, T>) {
    return value;
  } else {
    Element out;
    store(load(value), &out);
    return out;
  }
}

// to[i * to_step + j] = word i of from[j], for 4 x 4 words.
template <typename Word>
void transpose4(const void* const* from, int64_t word, Word* to, int64_t to_step) {
  typedef Word Four __attribute__((vector_size(4 * sizeof(Word))));
  Four row[4];
  for (int j = 0; j < 4; ++j) {
    std::memcpy(&row[j], static_cast<const Word*>(from[j]) + word, sizeof row[j]);
  }
  const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four column[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_step, &column[i], sizeof column[i]);
}

// Words of a panel whose depth is `length`.
template <typename Gemm>
int64_t words_of(int64_t length) {
  return ceil_div(length, Gemm::kPerWord * Gemm::kStep) * Gemm::kStep;
}

enum class Side { kA, kB };

template <typename Gemm, Side side>
constexpr int64_t kPanelWidth = side == Side::kA ? Gemm::kRows : Gemm::kCols;

// Whether the words of a vector stand side by side in a panel, kStep of them, and not those of all
// vectors at one depth.
template <typename Gemm, Side side>
constexpr bool kInTiles = side == Side::kA && Gemm::kStep > 1;

// A panel whose vectors are `count` rows of m from `first` and whose depth is its first `length`
// columns; zeros fill it up to `width` vectors and to whole steps.
template <typename Gemm, Side side, int64_t width = kPanelWidth<Gemm, side>, typename T>
void pack_rows(const Matrix<T>& m, int64_t first, int64_t count, int64_t length,
               typename Gemm::Word* out) {
  using Element = typename Gemm::Element;
  using Word = typename Gemm::Word;
  const int64_t words = length / Gemm::kPerWord, padded = words_of<Gemm>(length);
  const auto place = [](int64_t k, int64_t i) {
    if constexpr (side == Side::kA) {
      return Gemm::a_word(k, i);
    } else {
      return k * width + i;
    }
  };
  const T* row[width];
  for (int64_t i = 0; i < count; ++i) row[i] = m.row(first + i);
  int64_t fast_rows = 0, fast_words = 0;
  if constexpr (std::is_same_v<T, Element>) {
    if (m.col_step == 1 && kInTiles<Gemm, side>) {
      fast_rows = count;
      fast_words = words / Gemm::kStep * Gemm::kStep;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < fast_words; k += Gemm::kStep) {
          std::memcpy(out + place(k, i), row[i] + k * Gemm::kPerWord, Gemm::kStep * sizeof(Word));
        }
      }
    } else if (m.col_step == 1) {
      // Neighbouring columns are a word already: transpose 4 x 4 of them at a time.
      fast_rows = count / 4 * 4;
      fast_words = words / 4 * 4;
      for (int64_t i = 0; i < fast_rows; i += 4) {
        const void* four[4] = {row[i], row[i + 1], row[i + 2], row[i + 3]};
        const int64_t next = std::min(i + 8, count);
        for (int64_t k = 0; k < fast_words; k += 4) {
          // A row is too short for the processor to see where it leads.
          for (int64_t j = i + 4; k % kLineWords == 0 && j < next; ++j) {
            __builtin_prefetch(row[j] + k * Gemm::kPerWord);
          }
          transpose4<Word>(four, k, out + k * width + i, width);
        }
      }
    }
  }
  const auto at = [&](int64_t i, int64_t column) {
    return convert<Element>(row[i][column * m.col_step]);
  };
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = i < fast_rows ? fast_words : 0; k < words; ++k) {
      const int64_t column = k * Gemm::kPerWord;
      out[place(k, i)] = Gemm::word(at(i, column), at(i, column + Gemm::kPerWord - 1));
    }
    int64_t k = words;
    if (length % Gemm::kPerWord != 0) {
      out[place(k++, i)] = Gemm::word(at(i, length - 1), Element{});
    }
    for (; k < padded; ++k) out[place(k, i)] = Word{};
  }
  for (int64_t k = 0; count < width && k < padded; ++k) {
    for (int64_t i = count; i < width; ++i) out[place(k, i)] = Word{};
  }
}

// Word k of `count` columns of m from `first`, of which the first `length` rows from `begin` are
// packed; zeros fill it up to `width`.
template <typename Gemm, int64_t width, typename T>
void pack_word(const Matrix<T>& m, int64_t begin, int64_t length, int64_t first, int64_t count,
               int64_t k, typename Gemm::Word* to) {
  using Element = typename Gemm::Element;
  using Word = typename Gemm::Word;
  k *= Gemm::kPerWord;
  if (k >= length) {
    std::fill_n(to, width, Word{});
    return;
  }
  for (int64_t ahead = k + kRowsAhead; ahead < std::min(k + kRowsAhead + Gemm::kPerWord, length);
       ++ahead) {
    __builtin_prefetch(m.row(begin + ahead) + first * m.col_step);
  }
  const T* low = m.row(begin + k) + first * m.col_step;
  const bool single = k + Gemm::kPerWord > length;
  const T* high = single ? low : m.row(begin + k + Gemm::kPerWord - 1) + first * m.col_step;
  if (m.col_step == 1 && count == width && !single) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      to[i] = Gemm::word(convert<Element>(low[i]), convert<Element>(high[i]));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Element other =
        single && Gemm::kPerWord > 1 ? Element{} : convert<Element>(high[i * m.col_step]);
    to[i] = Gemm::word(convert<Element>(low[i * m.col_step]), other);
  }
  std::fill(to + count, to + width, Word{});
}

// A panel whose vectors are `count` columns of m from `first` and whose depth is `length` of its
// rows from `begin`; zeros fill it up to its width and to whole steps.
template <typename Gemm, Side side, typename T>
void pack_columns(const Matrix<T>& m, int64_t begin, int64_t length, int64_t first, int64_t count,
                  typename Gemm::Word* out) {
  using Word = typename Gemm::Word;
  constexpr int64_t width = kPanelWidth<Gemm, side>;
  const int64_t words = words_of<Gemm>(length);
  if constexpr (kInTiles<Gemm, side>) {
    Word lines[Gemm::kStep * width];
    for (int64_t step = 0; step < words; step += Gemm::kStep) {
      for (int64_t k = 0; k < Gemm::kStep; ++k) {
        pack_word<Gemm, width>(m, begin, length, first, count, step + k, lines + k * width);
      }
      for (int64_t k = 0; k < Gemm::kStep; k += 4) {
        const Word* line = lines + k * width;
        const void* four[4] = {line, line + width, line + 2 * width, line + 3 * width};
        for (int64_t i = 0; i < width; i += 4) {
          transpose4<Word>(four, i, out + Gemm::a_word(step + k, i), Gemm::kStep);
        }
      }
    }
  } else {
    for (int64_t k = 0; k < words; ++k) {
      pack_word<Gemm, width>(m, begin, length, first, count, k, out + k * width);
    }
  }
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
