// Attention of rows that read one token each: to their prompt, which rows share, and to their own
// tokens so far.
//
// Keys lie with the token innermost, [size, tokens], and values with the size innermost, so that
// both products are the same one: a few numbers of a query's head, or its weights, times vectors of
// a matrix that lies in memory as it is read. What queries of one head of keys have in common is
// read once. A task is a row and a head of keys and is done by one thread, so that a row's result
// does not depend on other rows.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "latro.h"
#include "softmax.h"
#include "sweep.h"
#include "vector_math.h"

namespace {

using namespace latro;

// Columns whose sums are held in registers, and query heads that are taken at once.
constexpr int64_t kColumns = 64, kHeads = 4;

// c[heads][N], rows c_step apart, = or += (with `add`) a[heads][K] times b[K][N]; N <= kColumns.
template <int64_t heads, bool whole, typename T>
void multiply_block(const float* a, int64_t a_step, const T* b, int64_t b_step, int64_t K,
                    int64_t N, float* c, int64_t c_step, bool add) {
  const int64_t n = whole ? kColumns : N;
  float sum[heads][kColumns];
  for (int64_t h = 0; h < heads; ++h) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[h][j] = add ? c[h * c_step + j] : 0.0f;
  }
  for (int64_t k = 0; k < K; ++k) {
    const T* of_k = b + k * b_step;
#pragma GCC unroll 4
    for (int64_t h = 0; h < heads; ++h) {
      const float factor = a[h * a_step + k];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sum[h][j] += factor * load(of_k[j]);
    }
  }
  for (int64_t h = 0; h < heads; ++h) std::copy_n(sum[h], n, c + h * c_step);
}

template <int64_t heads, typename T>
void multiply_heads(const float* a, int64_t a_step, const T* b, int64_t b_step, int64_t K,
                    int64_t N, float* c, int64_t c_step, bool add) {
  int64_t j = 0;
  for (; j + kColumns <= N; j += kColumns) {
    multiply_block<heads, true>(a, a_step, b + j, b_step, K, kColumns, c + j, c_step, add);
  }
  if (j < N) multiply_block<heads, false>(a, a_step, b + j, b_step, K, N - j, c + j, c_step, add);
}

template <typename T>
void multiply(int64_t heads, const float* a, int64_t a_step, const T* b, int64_t b_step, int64_t K,
              int64_t N, float* c, int64_t c_step, bool add) {
  for (; heads >= kHeads; heads -= kHeads, a += kHeads * a_step, c += kHeads * c_step) {
    multiply_heads<kHeads>(a, a_step, b, b_step, K, N, c, c_step, add);
  }
  if (heads == 3) multiply_heads<3>(a, a_step, b, b_step, K, N, c, c_step, add);
  if (heads == 2) multiply_heads<2>(a, a_step, b, b_step, K, N, c, c_step, add);
  if (heads == 1) multiply_heads<1>(a, a_step, b, b_step, K, N, c, c_step, add);
}

// Turns scores before scaling and softcap into weights that add up to 1.
void softmax_in_place(float* scores, int64_t n, float scaling, float softcap) {
  if (softcap > 0.0f) {
    const float inside = scaling / softcap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scores[j] = softcap * tanh_vec(scores[j] * inside);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scores[j] *= scaling;
  }
  float row_max = scores[0];
#pragma omp simd reduction(max : row_max)
  for (int64_t j = 0; j < n; ++j) row_max = std::max(row_max, scores[j]);
  float sum_exp = 0.0f;
#pragma omp simd reduction(+ : sum_exp)
  for (int64_t j = 0; j < n; ++j) {
    scores[j] = exp_vec(scores[j] - row_max);
    sum_exp += scores[j];
  }
  const float share = 1.0f / sum_exp;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) scores[j] *= share;
}

}  // namespace

int32_t latro_cpu_decode_attention(const void* query, const void* key, const void* value,
                                   int32_t dtype, const void* prompt_keys,
                                   const void* prompt_values, int64_t prompts, int64_t prompt_room,
                                   void* own_keys, void* own_values, int64_t own_room,
                                   const int64_t* prompt, const int64_t* prompt_length,
                                   const int64_t* length, void* out, int64_t R, int64_t heads,
                                   int64_t key_heads, int64_t size, int64_t value_size,
                                   int64_t window, float scaling, float softcap, int64_t threads) {
  // Here, since looking at so few numbers from Python costs more than small rows' attention.
  for (int64_t row = 0; row < R; ++row) {
    const bool fits = prompt[row] >= 0 && prompt[row] < prompts && prompt_length[row] >= 0 &&
                      prompt_length[row] <= prompt_room && length[row] >= 0 &&
                      length[row] < own_room;
    if (!fits) return LATRO_OUT_OF_RANGE;
  }
  return with_types(dtype, 0, [&](auto, auto element) -> int32_t {
    using T = decltype(element);
    const int64_t groups = heads / key_heads;
    int64_t longest = 0;
    for (int64_t row = 0; row < R; ++row) {
      longest = std::max(longest, prompt_length[row] + length[row] + 1);
    }
    const int64_t tasks = R * key_heads;
    // One thread or all: OpenMP ends the threads that a smaller team leaves out.
    const int64_t used = tasks == 1 ? 1 : threads;
    const int64_t scratch = groups * (size + longest + value_size);
    const std::unique_ptr<float[]> room(new (std::nothrow) float[used * scratch]);
    if (room == nullptr) return LATRO_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(static_cast<int>(used)) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = task / key_heads, head = task % key_heads;
      float* q = room.get() + omp_get_thread_num() * scratch;
      float* scores = q + groups * size;
      float* sums = scores + groups * longest;
      const int64_t P = prompt_length[row], before = length[row], keys = P + before + 1;

      // The token that is read joins the row's own.
      T* own_key = static_cast<T*>(own_keys) + (row * key_heads + head) * size * own_room;
      T* own_value = static_cast<T*>(own_values) + (row * key_heads + head) * own_room * value_size;
      const T* new_key = static_cast<const T*>(key) + (row * key_heads + head) * size;
      for (int64_t d = 0; d < size; ++d) own_key[d * own_room + before] = new_key[d];
      std::copy_n(static_cast<const T*>(value) + (row * key_heads + head) * value_size, value_size,
                  own_value + before * value_size);

      // The window's first key, counted over the prompt and the row's own tokens.
      const int64_t first = window > 0 ? std::max<int64_t>(0, keys - window) : 0;
      const int64_t skip = std::min(first, P), skip_own = std::max<int64_t>(0, first - P);
      const int64_t of_prompt = P - skip, own = before + 1 - skip_own;
      const int64_t place = prompt[row] * key_heads + head;
      const T* prompt_key = static_cast<const T*>(prompt_keys) + place * size * prompt_room + skip;
      const T* prompt_value =
          static_cast<const T*>(prompt_values) + (place * prompt_room + skip) * value_size;

      const T* of_row = static_cast<const T*>(query) + (row * heads + head * groups) * size;
      for (int64_t i = 0; i < groups * size; ++i) q[i] = load(of_row[i]);
      multiply(groups, q, size, prompt_key, prompt_room, size, of_prompt, scores, longest, false);
      multiply(groups, q, size, own_key + skip_own, own_room, size, own, scores + of_prompt,
               longest, false);
      for (int64_t g = 0; g < groups; ++g) {
        softmax_in_place(scores + g * longest, of_prompt + own, scaling, softcap);
      }
      multiply(groups, scores, longest, prompt_value, value_size, of_prompt, value_size, sums,
               value_size, false);
      multiply(groups, scores + of_prompt, longest, own_value + skip_own * value_size, value_size,
               own, value_size, sums, value_size, true);
      T* to = static_cast<T*>(out) + (row * heads + head * groups) * value_size;
      store_all(sums, groups * value_size, to);
    }
    return LATRO_OK;
  });
}
