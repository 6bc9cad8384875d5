// A linear layer for few rows on the CPU: the products of few_rows.h, with a bias, in the dtype of
// x.
#include "few_rows.h"
#include "latro.h"

namespace {

using namespace latro;

// With fewer bytes of weight, or products, threads take longer to wake than to do their parts.
constexpr int64_t kBytesOfThreads = 128 << 10;
constexpr int64_t kProductsOfThreads = 512 << 10;
// A weight of at most so many bytes stays in the cache that each core has for itself.
constexpr int64_t kCachedBytes = 1 << 20;
// Parts of the columns for each thread, so that one that is held up does fewer of them.
constexpr int64_t kPartsPerThread = 4;

template <typename T>
struct Linear {
  const T* x;
  Matrix<T> weight;
  const T* bias;  // or null
  T* out;
  int64_t H, V;

  // Takes N rows from `first` on so many threads; false where there is no memory.
  template <typename Gemm>
  bool rows(Gemm, int64_t first, int64_t N, int64_t threads) const {
    FewRows<Gemm, T> few(Matrix<T>{x + first * H, H, 1}, weight, N, H, threads);
    if (!few.ok()) return false;
    const int64_t part =
        ceil_div(V, threads * kPartsPerThread * Gemm::kFewColumns) * Gemm::kFewColumns;
    for_each_group(few, V, std::min(part, kGroupCols),
                   [&](int64_t row, const float* products, int64_t column, int64_t n) {
                     float sum[kGroupCols];
                     std::copy_n(products, n, sum);
                     if (bias != nullptr) {
#pragma omp simd
                       for (int64_t j = 0; j < n; ++j) sum[j] += load(bias[column + j]);
                     }
                     store_all(sum, n, out + (first + row) * V + column);
                   });
    return true;
  }
};

}  // namespace

int32_t latro_cpu_few_rows_linear(const void* x, const void* weight, int64_t weight_row_step,
                                  int64_t weight_col_step, const void* bias, void* out,
                                  int32_t dtype, int32_t bf16_products, int64_t N, int64_t H,
                                  int64_t V, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    constexpr int64_t panel = decltype(gemm)::kWidePanel;
    const Linear<T> linear{static_cast<const T*>(x),
                           {static_cast<const T*>(weight), weight_row_step, weight_col_step},
                           static_cast<const T*>(bias),
                           static_cast<T*>(out),
                           H,
                           V};
    const int64_t bytes = V * H * static_cast<int64_t>(sizeof(T));
    const bool by_rows = bytes <= kCachedBytes && N > panel;
    // One thread or all: OpenMP ends the threads that a smaller team leaves out.
    if (by_rows ? N * V * H < kProductsOfThreads : bytes < kBytesOfThreads) threads = 1;
    std::atomic<bool> ok{true};
    if (by_rows && threads > 1) {
      // Each core has the weight, and little but its own rows goes from core to core.
      const int64_t share = ceil_div(ceil_div(N, threads), panel) * panel;
      const int64_t most = std::min(kFewRows, share);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
      for (int64_t first = 0; first < N; first += most) {
        if (!linear.rows(gemm, first, std::min(most, N - first), 1)) ok = false;
      }
    } else {
      for (int64_t first = 0; first < N && ok; first += kFewRows) {
        ok = linear.rows(gemm, first, std::min(kFewRows, N - first), threads);
      }
    }
    return ok ? LATRO_OK : LATRO_OUT_OF_MEMORY;
  });
}
