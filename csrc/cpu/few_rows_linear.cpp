// A linear layer for few rows on the CPU: the products of few_rows.h, with a bias, in the dtype of
// x.
#include "few_rows.h"
#include "latro.h"

namespace {

using namespace latro;

// Below so many bytes of weight a thread takes longer to wake than to do its part.
constexpr int64_t kBytesPerThread = 64 << 10;
// Parts of the columns for each thread, so that one that is held up does fewer of them.
constexpr int64_t kPartsPerThread = 4;

}  // namespace

int32_t latro_cpu_few_rows_linear(const void* x, const void* weight, int64_t weight_row_step,
                                  int64_t weight_col_step, const void* bias, void* out,
                                  int32_t dtype, int32_t bf16_products, int64_t N, int64_t H,
                                  int64_t V, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Matrix<T> m{static_cast<const T*>(weight), weight_row_step, weight_col_step};
    const T* of_columns = static_cast<const T*>(bias);
    const int64_t bytes = V * H * static_cast<int64_t>(sizeof(T));
    const int64_t used = std::max<int64_t>(1, std::min(threads, bytes / kBytesPerThread));
    constexpr int64_t columns = decltype(gemm)::kFewColumns;
    const int64_t part = ceil_div(V, used * kPartsPerThread * columns) * columns;
    for (int64_t first = 0; first < N; first += kFewRows) {
      const Matrix<T> rows{static_cast<const T*>(x) + first * H, H, 1};
      FewRows<decltype(gemm), T> few(rows, m, std::min(kFewRows, N - first), H, used);
      if (!few.ok()) return LATRO_OUT_OF_MEMORY;
      T* to = static_cast<T*>(out) + first * V;
      for_each_group(few, V, std::min(part, kGroupCols),
                     [&](int64_t row, const float* products, int64_t column, int64_t n) {
                       float sum[kGroupCols];
                       std::copy_n(products, n, sum);
                       if (of_columns != nullptr) {
#pragma omp simd
                         for (int64_t j = 0; j < n; ++j) sum[j] += load(of_columns[column + j]);
                       }
                       store_all(sum, n, to + row * V + column);
                     });
    }
    return LATRO_OK;
  });
}
