// Products of few rows with a large weight, at the speed at which the weight can be read.
//
// The weight is read once and as it lies. A vector holds one depth k of 8 or 16 rows of `hidden`,
// which are packed so, and each word of the weight multiplies one vector or two: nothing of the
// weight is packed or transposed. A thread takes a group of columns, which are neighbouring rows of
// the weight, and goes through eight parts of the group at once: eight long streams, which a
// processor fetches by itself, where eight neighbouring columns would be eight short ones. With AMX
// they are sixteen, and sixteen rows of the weight are a tile as they lie.
//
// Each entry is summed in the order in which `multiply` of gemm.h sums it, so that a row has the
// same bits here as among many rows there.
#ifndef LATRO_CPU_FEW_ROWS_H_
#define LATRO_CPU_FEW_ROWS_H_

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "gemm.h"
#include "pack.h"
#include "sweep.h"

namespace latro {

// The most rows for which this is at least as fast as packing the weight.
constexpr int64_t kFewRows = 64;
// The depth that is multiplied at once, in words; for vectors it must be that of one sum.
constexpr int64_t kFewDepth = VectorGemm::kMaxDepth;
// Words from where a row of the weight is multiplied to where it is fetched.
constexpr int64_t kFetchAhead = 4 * kLineWords;

// c[columns][width] = row . x over `words` of depth, or += with `add`, column j of c at j * c_step;
// x is a panel of `width` rows of hidden. It is not inlined, as its loop takes all registers.
template <int64_t columns, int64_t width>
__attribute__((noinline)) void multiply_few(Fp32Gemm, const float* const* row, const float* x,
                                            int64_t words, float* c, int64_t c_step, bool add) {
  constexpr int64_t lanes = std::min(width, Fp32Gemm::kLanes), parts = width / lanes;
  typedef float Vector __attribute__((vector_size(lanes * sizeof(float))));
  Vector sum[columns][parts] = {};
  const auto step = [&](int64_t k) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < parts; ++part) {
      Vector b;
      std::memcpy(&b, x + k * width + part * lanes, sizeof b);
#pragma GCC unroll 8
      for (int64_t j = 0; j < columns; ++j) {
        sum[j][part] = add_product(sum[j][part], row[j][k], b);
      }
    }
  };
  int64_t k = 0;
  for (; k + kLineWords <= words; k += kLineWords) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < columns; ++j) __builtin_prefetch(row[j] + k + kFetchAhead);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLineWords; ++i) step(k + i);
  }
  for (; k < words; ++k) step(k);
#pragma GCC unroll 8
  for (int64_t j = 0; j < columns; ++j) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < parts; ++part) {
      float* to = c + j * c_step + part * lanes;
      Vector before = {};
      if (add) std::memcpy(&before, to, sizeof before);
      before += sum[j][part];
      std::memcpy(to, &before, sizeof before);
    }
  }
}

#ifdef LATRO_HAS_AVX512_BF16
#define LATRO_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

// sum + a . b, where a word of a is two neighbouring k and b holds such words of as many rows.
template <typename Vector>
LATRO_BF16_TARGET inline void add_pairs(const bfloat16* a, const uint32_t* b, Vector& sum) {
  int32_t pair;
  std::memcpy(&pair, a, sizeof pair);
  if constexpr (sizeof(Vector) == sizeof(__m512)) {
    sum = reinterpret_cast<Vector>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
        reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
  } else {
    sum = reinterpret_cast<Vector>(_mm256_dpbf16_ps(
        reinterpret_cast<__m256>(sum), reinterpret_cast<__m256bh>(_mm256_set1_epi32(pair)),
        reinterpret_cast<__m256bh>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)))));
  }
}

template <int64_t columns, int64_t width>
__attribute__((noinline)) LATRO_BF16_TARGET void multiply_few(Bf16Gemm, const bfloat16* const* row,
                                                              const uint32_t* x, int64_t words,
                                                              float* c, int64_t c_step, bool add) {
  typedef float Vector __attribute__((vector_size(width * sizeof(float))));
  Vector sum[columns] = {};
  int64_t k = 0;
  for (; k + kLineWords <= words; k += kLineWords) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < columns; ++j) __builtin_prefetch(row[j] + 2 * (k + kFetchAhead));
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLineWords; ++i) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < columns; ++j) {
        add_pairs(row[j] + 2 * (k + i), x + (k + i) * width, sum[j]);
      }
    }
  }
  for (; k < words; ++k) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < columns; ++j) add_pairs(row[j] + 2 * k, x + k * width, sum[j]);
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < columns; ++j) {
    Vector before = {};
    if (add) std::memcpy(&before, c + j * c_step, sizeof before);
    before += sum[j];
    std::memcpy(c + j * c_step, &before, sizeof before);
  }
}
#endif

// What a thread needs for itself: products of a group, a row of the result for each row of a panel,
// and weights that are not words as they lie.
template <typename Gemm>
struct FewScratch {
  Room<float> by_column, by_row;
  Room<typename Gemm::Element> words;

  explicit FewScratch(int64_t padded_rows)
      : by_column(room<float>(padded_rows * kGroupCols)),
        by_row(room<float>(Gemm::kWidePanel * kGroupCols)),
        words(room<typename Gemm::Element>(Gemm::kFewColumns * kFewDepth * Gemm::kPerWord)) {}
  bool ok() const { return by_column && by_row && words; }
};

// The products of N rows of hidden [N, H] with a weight of H columns.
template <typename Gemm, typename T>
struct FewRows {
  using Word = typename Gemm::Word;
  using Element = typename Gemm::Element;
  static constexpr int64_t kNarrowPanel = Gemm::kNarrowPanel, kWidePanel = Gemm::kWidePanel;
  static constexpr int64_t kFewColumns = Gemm::kFewColumns;

  const Matrix<T>& weight;
  const int64_t N, H, depth;  // depth: of H, in words
  Room<Word> panels;
  std::vector<FewScratch<Gemm>> threads;

  FewRows(const Matrix<T>& hidden, const Matrix<T>& weight, int64_t N, int64_t H,
          int64_t num_threads)
      : weight(weight), N(N), H(H), depth(words_of<Gemm>(H)), panels(room<Word>(padded() * depth)) {
    for (int64_t i = 0; i < num_threads; ++i) threads.emplace_back(padded());
    if (!ok()) return;
    for_each_panel([&](auto width, int64_t first) {
      pack_rows<Gemm, Side::kB, width>(hidden, first, std::min<int64_t>(width, N - first), H,
                                       panels.get() + first * depth);
    });
  }

  // Calls use(width, first row) for every panel. All are wide but for the last, which is the
  // narrowest that holds what is left.
  template <typename Use>
  void for_each_panel(Use use) const {
    for (int64_t first = 0; first < N; first += kWidePanel) in_panel<kNarrowPanel>(first, use);
  }
  template <int64_t width, typename Use>
  void in_panel(int64_t first, Use use) const {
    if constexpr (width < kWidePanel) {
      if (N - first > width) return in_panel<2 * width>(first, use);
    }
    use(std::integral_constant<int64_t, width>{}, first);
  }

  // Rows in all panels together.
  int64_t padded() const {
    int64_t rows = 0;
    for_each_panel([&](auto width, int64_t first) { rows = first + width; });
    return rows;
  }
  bool ok() const {
    return panels &&
           std::all_of(threads.begin(), threads.end(), [](const auto& own) { return own.ok(); });
  }

  // Calls use(row, products) for every row, where products has those of the `cols` columns from
  // `begin`, at most kGroupCols.
  template <typename Use>
  void group(int64_t begin, int64_t cols, FewScratch<Gemm>& own, Use use) {
    const int64_t part = cols / kFewColumns;
    const int64_t left = part * kFewColumns;
    if constexpr (Gemm::kStep > 1) {
      for (int64_t j = 0; j < part; ++j) tile(begin, j, part, kFewColumns, own);
      if (left < cols) tile(begin, left, 1, cols - left, own);
    } else {
      for (int64_t j = 0; j < part; ++j) block<kFewColumns>(begin, j, part, own);
      for (int64_t j = left; j < cols; ++j) block<1>(begin, j, 0, own);
    }
    for_each_panel([&](auto width, int64_t first) {
      const float* from = own.by_column.get() + first * kGroupCols;
      for (int64_t j = 0; j < cols; j += 4) {
        const float* column = from + j * width;
        const void* four[4] = {column, column + width, column + 2 * width, column + 3 * width};
        for (int64_t i = 0; i < width; i += 4) {
          transpose4<float>(four, i, own.by_row.get() + i * kGroupCols + j, kGroupCols);
        }
      }
      for (int64_t i = 0; i < std::min<int64_t>(width, N - first); ++i) {
        use(first + i, own.by_row.get() + i * kGroupCols);
      }
    });
  }

  // The products of all rows with the columns `place`, place + part, ... of the group at `begin`.
  template <int64_t columns>
  void block(int64_t begin, int64_t place, int64_t part, FewScratch<Gemm>& own) {
    for (int64_t k = 0; k < depth; k += kFewDepth) {
      const int64_t words = std::min(kFewDepth, depth - k);
      const Element* row[columns];
      for (int64_t j = 0; j < columns; ++j) {
        row[j] = words_at(weight.row(begin + place + j * part), k * Gemm::kPerWord,
                          words * Gemm::kPerWord, own.words.get() + j * kFewDepth * Gemm::kPerWord);
      }
      for_each_panel([&](auto width, int64_t first) {
        multiply_few<columns, width>(Gemm{}, row, panels.get() + first * depth + k * width, words,
                                     own.by_column.get() + first * kGroupCols + place * width,
                                     part * width, k > 0);
      });
    }
  }

  // The same with AMX, of `count` columns.
  void tile(int64_t begin, int64_t place, int64_t part, int64_t count, FewScratch<Gemm>& own) {
    for (int64_t k = 0; k < depth; k += kFewDepth) {
      const int64_t words = std::min(kFewDepth, depth - k), length = words * Gemm::kPerWord;
      const int64_t from = k * Gemm::kPerWord;
      const Element* rows = weight.row(begin + place) + from;
      int64_t row_step = part * weight.row_step;
      if (count < kFewColumns || weight.col_step != 1 || from + length > H) {
        rows = own.words.get();
        row_step = length;
        for (int64_t j = 0; j < count; ++j) {
          Element* to = own.words.get() + j * length;
          const Element* at = words_at(weight.row(begin + place + j * part), from, length, to);
          if (at != to) std::copy_n(at, length, to);
        }
        std::fill(own.words.get() + count * length, own.words.get() + kFewColumns * length,
                  Element{});
      }
      for (int64_t first = 0; first < N; first += kWidePanel) {
        Gemm::multiply_tile(rows, row_step * static_cast<int64_t>(sizeof(Element)),
                            panels.get() + first * depth + k * kWidePanel, words,
                            own.by_column.get() + first * kGroupCols + place * kWidePanel,
                            part * kWidePanel, k > 0);
      }
    }
  }

  // The words of a row of the weight from `begin`: in place, or in `room` where they do not lie so.
  const Element* words_at(const T* row, int64_t begin, int64_t length, Element* room) const {
    const int64_t there = std::min(length, H - begin);
    if constexpr (std::is_same_v<T, Element>) {
      if (weight.col_step == 1 && there == length) return row + begin;
    }
    if (weight.col_step == 1) {
#pragma omp simd
      for (int64_t k = 0; k < there; ++k) room[k] = convert<Element>(row[begin + k]);
    } else {
      for (int64_t k = 0; k < there; ++k) {
        room[k] = convert<Element>(row[(begin + k) * weight.col_step]);
      }
    }
    for (int64_t k = there; k < length; ++k) room[k] = Element{};
    return room;
  }
};

// Calls use(row, products, column, n) for every row and each group of n <= `cols` columns from
// `column`, on `few.threads.size()` threads; cols is at most kGroupCols.
template <typename Gemm, typename T, typename Use>
void for_each_group(FewRows<Gemm, T>& few, int64_t V, int64_t cols, Use use) {
  std::atomic<int64_t> free_group{0};
  const int64_t groups = ceil_div(V, cols);
  const auto work = [&](FewScratch<Gemm>& own) {
    const typename Gemm::Session session;
    for (int64_t group = free_group++; group < groups; group = free_group++) {
      const int64_t begin = group * cols, n = std::min(cols, V - begin);
      few.group(begin, n, own,
                [&](int64_t row, const float* products) { use(row, products, begin, n); });
    }
  };
  if (few.threads.size() == 1) return work(few.threads[0]);
#pragma omp parallel num_threads(static_cast<int>(few.threads.size()))
  work(few.threads[omp_get_thread_num()]);
}

// Calls fold(row, products, column, n) for every row and each group of n <= kGroupCols columns from
// `column`. Of one row the calls follow one another in the order of the columns, on any thread;
// calls for different rows run at the same time. Returns false where there is no memory.
template <typename Gemm, typename T, typename Fold>
bool few_rows_sweep(const Head<T>& head, int64_t N, int64_t num_threads, Fold fold) {
  FewRows<Gemm, T> few(head.hidden, head.weight, N, head.H, num_threads);
  if (!few.ok()) return false;
  std::vector<std::atomic<int64_t>> turn(static_cast<size_t>(N));  // a row's next column
  for_each_group(few, head.V, kGroupCols,
                 [&](int64_t row, const float* products, int64_t column, int64_t n) {
                   while (turn[row].load(std::memory_order_acquire) != column) {
                     std::this_thread::yield();
                   }
                   fold(row, products, column, n);
                   turn[row].store(column + n, std::memory_order_release);
                 });
  return true;
}

}  // namespace latro

#endif  // LATRO_CPU_FEW_ROWS_H_
