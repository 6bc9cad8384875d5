// Panels of the operands of a product (gemm.h), packed from matrices as they lie.
#ifndef LATRO_CPU_PACK_H_
#define LATRO_CPU_PACK_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm.h"

namespace latro {

// Rows fetched before they are packed.
constexpr int64_t kRowsAhead = 16;

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

}  // namespace latro

#endif  // LATRO_CPU_PACK_H_
