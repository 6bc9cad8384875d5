// linear_sample on the CPU: the forward of linear_logprob, which also keeps the column of the
// highest z + Gumbel noise.
//
// Products, groups of columns and folds are those of linear_logprob, in its order, so that row_max,
// sum_exp and weighted_sum are the same bits. Noise is made only as far as it may decide: for no
// column of a group where the largest logit with the largest noise would not win, and as a
// logarithm for the few columns that a bound lets through. What wins is the same as if all of it
// were made.
#include <omp.h>

#include <algorithm>

#include "few_rows.h"
#include "latro.h"
#include "philox.h"
#include "sweep.h"

namespace {

using namespace latro;

// Of each row [N]: by what it is drawn.
struct Draw {
  const int64_t *seed, *position;
  int64_t first_col;  // the number of the weight's first column in the whole vocabulary
  bool greedy;
};

// Of each row [N]: what is filled in.
struct RowState {
  int64_t* token;
  float *score, *target_logit, *row_max, *sum_exp, *weighted_sum;

  void clear(int64_t N, int64_t first_col) const {
    std::fill_n(token, N, first_col);
    for (float* lowest : {score, target_logit, row_max}) std::fill_n(lowest, N, -kInfinity);
    for (float* sum : {sum_exp, weighted_sum}) std::fill_n(sum, N, 0.0f);
  }
};

// The highest score of one row so far.
struct Best {
  float score, logit;
  int64_t column;

  void meet(float new_score, float z, int64_t at) {
    // Columns come in order: of equal scores the first stays.
    if (new_score > score) *this = {new_score, z, at};
  }

  // Meets the logits z of columns `first` .. first + n, without noise.
  void meet_logits(const float* z, int64_t first, int64_t n) {
    if (largest(z, n, score) == score) return;
    for (int64_t j = 0; j < n; ++j) meet(z[j], z[j], first + j);
  }

  // Meets them with the noise of `philox`.
  void meet_noisy(const float* z, int64_t first, int64_t n, const Philox& philox) {
    const float top = largest(z, n, -kInfinity);
    if (top + kMaxGumbel <= score) return;
    const int64_t end = first + n;
    for (int64_t begin = first / 4 * 4; begin < end; begin += kNoiseCols) {
      uint32_t words[4][kCounters];
      philox.words(static_cast<uint32_t>(begin / 4), words);
      // The smallest word has the largest noise.
      if (top + gumbel_bound(smallest(words)) <= score) continue;
      for (int64_t j = std::max(begin, first); j < std::min(begin + kNoiseCols, end); ++j) {
        const uint32_t word = words[j % 4][(j - begin) / 4];
        const float logit = z[j - first];
        if (logit + gumbel_bound(word) > score) meet(logit + gumbel(word), logit, j);
      }
    }
  }

  static uint32_t smallest(const uint32_t words[4][kCounters]) {
    uint32_t least = ~0u;
    for (int64_t w = 0; w < 4; ++w) {
#pragma omp simd reduction(min : least)
      for (int64_t i = 0; i < kCounters; ++i) least = std::min(least, words[w][i]);
    }
    return least;
  }
};

// The fold of products into the state of a row.
template <typename T>
struct RowFold {
  const Head<T>& head;
  const Draw draw;
  const RowState state;

  // Adds n products, of the weight's columns from `column`.
  void operator()(int64_t row, const float* products, int64_t column, int64_t n) const {
    float z[kGroupCols];
    head.transform.logits(products, head.bias_at(column), n, z);
    State folded{state.row_max[row], state.sum_exp[row], state.weighted_sum[row]};
    folded.add(z, n, latro::kEntropy);
    state.row_max[row] = folded.row_max;
    state.sum_exp[row] = folded.sum_exp;
    state.weighted_sum[row] = folded.weighted_sum;
    Best best{state.score[row], state.target_logit[row], state.token[row]};
    const int64_t first = draw.first_col + column;
    if (draw.greedy) {
      best.meet_logits(z, first, n);
    } else {
      best.meet_noisy(z, first, n, Philox(draw.seed[row], draw.position[row]));
    }
    state.score[row] = best.score;
    state.target_logit[row] = best.logit;
    state.token[row] = best.column;
  }
};

// The sweep for many rows.
template <typename Gemm, typename T>
struct Sampling : Sweep<Gemm, T> {
  using Base = Sweep<Gemm, T>;
  using Base::head, Base::kRows, Base::width;
  const RowFold<T>& fold;

  Sampling(const RowFold<T>& fold, int64_t threads)
      : Base(fold.head, false, false, threads), fold(fold) {}

  void run(int64_t N) {
    const int64_t rows = chunk_rows<Gemm>(N);
#pragma omp parallel num_threads(static_cast<int>(this->threads.size()))
    {
      const typename Gemm::Session session;
      for (int64_t begin = 0; begin < head.V; begin += width) {
        const int64_t cols = std::min(width, head.V - begin);
        this->pack_weight_rows(begin, cols);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < N; first += rows) {
          chunk(first, std::min(rows, N - first), begin, cols, this->threads[omp_get_thread_num()]);
        }
      }
    }
  }

  void chunk(int64_t first, int64_t count, int64_t begin, int64_t cols, Scratch<Gemm>& own) {
    this->pack_chunk(head.hidden, first, count, own);
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t to = std::min(from + kGroupCols, cols);
      for (int64_t i = 0; i < count; i += kRows) {
        this->products(own, i, from, to, own.products.get());
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          fold(first + i + r, own.products.get() + r * kGroupCols, begin + from, to - from);
        }
      }
    }
  }
};

}  // namespace

int32_t latro_cpu_linear_sample(const void* hidden, int64_t hidden_row_step,
                                int64_t hidden_col_step, const void* weight,
                                int64_t weight_row_step, int64_t weight_col_step, int32_t dtype,
                                int32_t bf16_products, const float* bias, const int64_t* seed,
                                const int64_t* position, int64_t first_col, int32_t greedy,
                                int64_t* token, float* score, float* target_logit, float* row_max,
                                float* sum_exp, float* weighted_sum, int64_t N, int64_t H,
                                int64_t V, float softcap, float temperature, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Head<T> head{{static_cast<const T*>(hidden), hidden_row_step, hidden_col_step},
                       {static_cast<const T*>(weight), weight_row_step, weight_col_step},
                       bias,
                       nullptr,
                       H,
                       V,
                       Transform{softcap, temperature}};
    const RowState state{token, score, target_logit, row_max, sum_exp, weighted_sum};
    state.clear(N, first_col);
    const RowFold<T> fold{head, Draw{seed, position, first_col, greedy != 0}, state};
    if (N <= kFewRows) {
      const bool ok = few_rows_sweep<decltype(gemm)>(head, N, threads, fold);
      return ok ? LATRO_OK : LATRO_OUT_OF_MEMORY;
    }
    Sampling<decltype(gemm), T> sampling(fold, threads);
    if (!sampling.ok()) return LATRO_OUT_OF_MEMORY;
    sampling.run(N);
    return LATRO_OK;
  });
}
