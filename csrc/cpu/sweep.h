// A sweep over the vocabulary: what every op at the LM head does on the CPU. A slice of the weight
// is packed once, all rows pass over it in chunks, and each chunk is one thread's.
#ifndef LATRO_CPU_SWEEP_H_
#define LATRO_CPU_SWEEP_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "gemm.h"
#include "latro.h"
#include "pack.h"
#include "softmax.h"

namespace latro {

// The filter leaves out so many columns together, of a Gemm's kFilterRows.
constexpr int64_t kFilterCols = 96;
// Columns whose products are folded together: what one panel of rows makes of them fits the
// first-level cache, and their weights the second-level one.
constexpr int64_t kGroupCols = 2 * kFilterCols;
// The most rows that one thread takes at a time.
template <typename Gemm>
constexpr int64_t kChunkRows = 4 * Gemm::kFilterRows;
// The most rows over which a slice of dw is summed in one go.
template <typename Gemm>
constexpr int64_t kMaxBlockRows = 1056 / kChunkRows<Gemm> * kChunkRows<Gemm>;
// A packed slice of the weight; it shares the last-level cache with dz and hidden.
constexpr int64_t kSliceBytes = 4 << 20;

template <typename T>
struct Head {
  Matrix<T> hidden, weight;
  const float* bias;      // or null
  const int64_t* target;  // out of 0 .. V: not among these columns
  int64_t H, V;
  Transform transform;

  const float* bias_at(int64_t column) const { return bias != nullptr ? bias + column : nullptr; }
};

// Rows in a chunk, of M: few rows make small chunks, so that there is one for every thread.
template <typename Gemm>
int64_t chunk_rows(int64_t M) {
  return M < 480 ? 2 * Gemm::kFilterRows : kChunkRows<Gemm>;
}

// Columns in a slice: its packed weight, and a block's packed dz for them, have kSliceBytes each.
template <typename Gemm>
int64_t slice_columns(int64_t H, int64_t V) {
  const int64_t depth = std::max(words_of<Gemm>(H), words_of<Gemm>(kMaxBlockRows<Gemm>));
  const int64_t fit = kSliceBytes / (depth * static_cast<int64_t>(sizeof(float)));
  const int64_t cols = std::max<int64_t>(1, fit / kGroupCols) * kGroupCols;
  return std::min(cols, ceil_div(V, kGroupCols) * kGroupCols);
}

// A thread's own room: a chunk of packed rows, products, and the chunk's dz, plain and packed.
template <typename Gemm>
struct Scratch {
  using Word = typename Gemm::Word;
  using Element = typename Gemm::Element;
  Room<Word> rows, dz_rows;
  Room<typename Gemm::Product> products;
  Room<float> z;
  Room<Element> dz;

  // `width` columns of dz, or 0 for none.
  Scratch(int64_t H, int64_t width)
      : rows(room<Word>(kChunkRows<Gemm> * words_of<Gemm>(H))),
        dz_rows(room<Word>(kChunkRows<Gemm> * words_of<Gemm>(width))),
        products(room<typename Gemm::Product>(Gemm::kRows * kGroupCols)),
        z(room<float>(kChunkRows<Gemm> * width)),
        dz(room<Element>(kChunkRows<Gemm> * width)) {}
  bool ok() const { return rows && dz_rows && products && z && dz; }
};

// The parts of a sweep over the vocabulary that forward and backward share.
template <typename Gemm, typename T>
struct Sweep {
  using Word = typename Gemm::Word;
  using Element = typename Gemm::Element;
  static constexpr int64_t kRows = Gemm::kRows, kCols = Gemm::kCols;

  const Head<T>& head;
  const int64_t words, width;  // of H; of a slice
  Room<Word> weight_rows;      // a slice, for products with hidden
  Room<Word> weight_columns;   // a slice, for products with dz
  std::vector<Scratch<Gemm>> threads;

  // `cols`: the columns of a slice, where another sweep goes beside this one.
  Sweep(const Head<T>& head, bool with_dz, bool with_columns, int64_t num_threads, int64_t cols = 0)
      : head(head),
        words(words_of<Gemm>(head.H)),
        width(cols > 0 ? cols : slice_columns<Gemm>(head.H, head.V)),
        weight_rows(room<Word>(width * words)),
        weight_columns(room<Word>(
            with_columns ? ceil_div(head.H, kCols) * kCols * words_of<Gemm>(width) : 0)) {
    for (int64_t i = 0; i < num_threads; ++i) threads.emplace_back(head.H, with_dz ? width : 0);
  }

  bool ok() const {
    return weight_rows && weight_columns &&
           std::all_of(threads.begin(), threads.end(), [](const auto& s) { return s.ok(); });
  }

  // Packs the slice begin .. begin + cols; called by all threads, who wait for one another.
  void pack_weight_rows(int64_t begin, int64_t cols) {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < cols; j += kCols) {
      pack_rows<Gemm, Side::kB>(head.weight, begin + j, std::min(kCols, cols - j), head.H,
                                weight_rows.get() + j * words);
    }
  }
  void pack_weight_columns(int64_t begin, int64_t cols) {
#pragma omp for schedule(static)
    for (int64_t h = 0; h < head.H; h += kCols) {
      pack_columns<Gemm, Side::kB>(head.weight, begin, cols, h, std::min(kCols, head.H - h),
                                   weight_columns.get() + h * words_of<Gemm>(width));
    }
  }

  void pack_chunk(const Matrix<T>& hidden, int64_t first, int64_t count, Scratch<Gemm>& own) {
    for (int64_t i = 0; i < count; i += kRows) {
      pack_rows<Gemm, Side::kA>(hidden, first + i, std::min(kRows, count - i), head.H,
                                own.rows.get() + i * words);
    }
  }

  // Products of the chunk's panel of rows at `i` with the slice's columns from .. to.
  void products(Scratch<Gemm>& own, int64_t i, int64_t from, int64_t to,
                typename Gemm::Product* out) const {
    for (int64_t j = from; j < to; j += kCols) {
      multiply<Gemm>(own.rows.get() + i * words, weight_rows.get() + j * words, words,
                     out + (j - from), kGroupCols, false);
    }
  }

  // Packs columns from .. to of the panel of dz at row `i` of the chunk.
  void pack_dz_rows(Scratch<Gemm>& own, int64_t i, int64_t count, int64_t from, int64_t to) const {
    const Matrix<Element> dz{own.dz.get() + from, width, 1};
    pack_rows<Gemm, Side::kA>(
        dz, i, std::min(kRows, count - i), to - from,
        own.dz_rows.get() + i * words_of<Gemm>(width) + from / Gemm::kPerWord * kRows);
  }

  // block[kRows][kCols] = dz . W for the panel of rows at `i` and the columns of W at `h`, over the
  // slice's columns from .. to; added with `add`.
  void multiply_dz(Scratch<Gemm>& own, int64_t i, int64_t h, int64_t from, int64_t to, bool add,
                   typename Gemm::Product* block) const {
    const int64_t depth = words_of<Gemm>(width), begin = from / Gemm::kPerWord;
    multiply<Gemm>(own.dz_rows.get() + i * depth + begin * kRows,
                   weight_columns.get() + h * depth + begin * kCols, words_of<Gemm>(to - from),
                   block, kCols, add);
  }
};

// Calls run(gemm, element) with the types that a dtype and a kind of product stand for.
template <typename Run>
int32_t with_types(int32_t dtype, int32_t bf16_products, Run run) {
  if (bf16_products != LATRO_BF16_WIDENED && dtype != LATRO_BF16) return LATRO_BAD_DTYPE;
#ifdef LATRO_HAS_AMX
  if (bf16_products == LATRO_BF16_AMX && amx_gemm_supported()) return run(AmxGemm{}, bfloat16{});
#endif
#ifdef LATRO_HAS_AVX512_BF16
  if (bf16_products == LATRO_BF16_AVX512 && bf16_gemm_supported())
    return run(Bf16Gemm{}, bfloat16{});
#endif
  if (bf16_products != LATRO_BF16_WIDENED) return LATRO_UNSUPPORTED;
  if (dtype == LATRO_F32) return run(Fp32Gemm{}, float{});
  if (dtype == LATRO_BF16) return run(Fp32Gemm{}, bfloat16{});
  if (dtype == LATRO_F16) return run(Fp32Gemm{}, float16{});
  return LATRO_BAD_DTYPE;
}

}  // namespace latro

#endif  // LATRO_CPU_SWEEP_H_
