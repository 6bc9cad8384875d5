/* Every symbol that the native libraries export, and nothing else: the ABI contract.
 *
 * `latro_kernels/native.py` reads this file to learn each function's argument types, so the
 * declarations keep to one form:
 *
 *     LATRO_API int32_t latro_<cpu|cuda>_<op>_<step>(type name, ...);
 *
 * with pointers, int64_t (every count and stride), int32_t (codes and flags), float and double.
 * `latro_cpu_*` lives in _cpu.so and takes the number of threads last; `latro_cuda_*` lives in
 * _cuda.so and takes the stream last. The result is LATRO_OK, another code from below, or, from a
 * CUDA launcher, the cudaError_t.
 */
#ifndef LATRO_H_
#define LATRO_H_

#include <stdint.h>

#if defined(__cplusplus)
#define LATRO_API extern "C" __attribute__((visibility("default")))
#else
#define LATRO_API __attribute__((visibility("default")))
#endif

/* Status. Negative, so that it never collides with a cudaError_t. */
enum {
  LATRO_OK = 0,
  LATRO_BAD_DTYPE = -1,
  LATRO_OUT_OF_MEMORY = -2,
  LATRO_UNSUPPORTED = -3,
  LATRO_OUT_OF_RANGE = -4,
};

/* Element types. */
enum {
  LATRO_F32 = 0,
  LATRO_BF16 = 1,
  LATRO_F16 = 2,
};

/* How the CPU multiplies bf16, each better than the one before: widened to fp32, or as it is with
 * the instructions of AVX512-BF16 or of AMX. Sums are fp32. */
enum {
  LATRO_BF16_WIDENED = 0,
  LATRO_BF16_AVX512 = 1,
  LATRO_BF16_AMX = 2,
};

/* The scratch of group_advantage on CUDA. */
enum {
  LATRO_GROUP_TILE_ROWS = 256,
  LATRO_GROUP_TILE_WORDS = 7,
};

/* Columns that a block of linear_sample on CUDA draws from. */
enum {
  LATRO_SAMPLE_PART_COLS = 4096,
};

/* group_advantage: a coefficient per row from the log-probabilities of G groups of K sequences.
 *
 * logp[N]; ref_logp[N] or row_kl[N], the other null, or both null, of use on rationale rows only;
 * offsets[2·G·K + 1], ascending from 0 to N, two segments a sequence: rationale, answer;
 * finished[G·K] or null for all; six outputs, five of [G·K] and coefficient[N]. Scratch: on the
 * CPU rewards[G·K]; on CUDA G·K doubles and, for each of N / LATRO_GROUP_TILE_ROWS + 1 tiles,
 * LATRO_GROUP_TILE_WORDS more. scale is 1 / (prompts·K) of the whole update. k3: 0, the KL
 * is part of the reward; 1, it is a term of the loss, k3 of ref_logp, and row_kl is null.
 * exclude_unfinished: 0, an unfinished sequence has the lowest reward of its group; 1, it is left
 * out.
 */
LATRO_API int32_t latro_cpu_group_advantage_forward(
    const float* logp, const float* ref_logp, const float* row_kl, const int64_t* offsets,
    const uint8_t* finished, float* reward, float* answer_logp, float* rationale_logp, float* kl,
    float* advantage, float* coefficient, double* rewards, int64_t G, int64_t K, double scale,
    double beta, double answer_weight, int32_t k3, int32_t exclude_unfinished, int64_t threads);

LATRO_API int32_t latro_cuda_group_advantage_forward(
    const float* logp, const float* ref_logp, const float* row_kl, const int64_t* offsets,
    const uint8_t* finished, float* reward, float* answer_logp, float* rationale_logp, float* kl,
    float* advantage, float* coefficient, double* scratch, int64_t N, int64_t G, int64_t K,
    double scale, double beta, double answer_weight, int32_t k3, int32_t exclude_unfinished,
    void* stream);

/* linear_logprob, whole, on the CPU.
 *
 * hidden and weight are [N, H] and [V, H] of `dtype` with any steps (in elements); bias[V] or null;
 * a target outside of 0 .. V - 1 is no column of this weight. bf16_products: how bf16 is
 * multiplied, for a processor that can; LATRO_BF16_WIDENED for other dtypes.
 * `latro_cpu_bf16_products` is the best that this one can.
 *
 *     z = softcap * tanh((hidden . weight + bias) / softcap) / temperature      softcap 0: none
 *
 * forward fills row_max[N], the maximum of z; sum_exp[N], the sum of exp(z - row_max);
 * target_logit[N], z at the target, -inf where it is no column; and, each or null, weighted_sum[N],
 * the sum of exp(z - row_max) * (z - row_max); with it, both or none, square_sum[N], the sum of
 * exp(z - row_max)^2, and logit_sum[N], the sum of z; dx_sum[N, H], the sum over j other than the
 * target of exp(z_j - row_max) * (dz_j / dproduct_j) * weight_j; cached[N, cached_cols], the
 * products of the first cached_cols columns, a multiple of 192 or V; block_max[N, ceil(V / 96)],
 * the maximum of z over each 96 columns.
 *
 * backward goes over the M rows whose numbers `rows` names (null: all, 0 .. M - 1), from the
 * forward's results, log_sum being log(sum_exp). With p the exponential of log_p,
 *
 *     dz_j = grad_logp * ((j is the target) - p_j)
 *            - p_j * (grad_entropy * log_p_j + offset - grad_square * p_j)
 *
 * where grad_square is 2 q / (sum of p^2) for the upstream gradient q of log(sum of p^2), null
 * where that has none; offset is grad_entropy * entropy + 2 q less the upstream gradient of
 * log(sum of exp(z)); grad_entropy and offset are null where none of the three has a gradient. It
 * fills dx[., H] in those rows, dw[V, H] in `dtype` and db[V], each or null. With block_max, 12 of
 * its rows (32 with AMX) by 96 columns are left out where they hold no target and no entry of dz
 * reaches grad_filter.
 */
LATRO_API int32_t latro_cpu_bf16_products(void);

LATRO_API int32_t latro_cpu_linear_logprob_forward(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* target, float* row_max, float* sum_exp, float* target_logit,
    float* weighted_sum, float* square_sum, float* logit_sum, float* dx_sum, float* cached,
    int64_t cached_cols, float* block_max, int64_t N, int64_t H, int64_t V, float softcap,
    float temperature, int64_t threads);

LATRO_API int32_t latro_cpu_linear_logprob_backward(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* target, const int64_t* rows, const float* grad_logp,
    const float* grad_entropy, const float* logp, const float* offset, const float* grad_square,
    const float* row_max, const float* log_sum, const float* cached, int64_t cached_cols,
    const float* block_max, float grad_filter, float* dx, void* dw, float* db, int64_t M, int64_t H,
    int64_t V, float softcap, float temperature, int64_t threads);

/* linear_sample, whole, on the CPU: a token drawn from each row's distribution.
 *
 * hidden, weight, bias and what z is made of are as in linear_logprob, and so are row_max[N],
 * sum_exp[N] and weighted_sum[N], to the bit. token[N] is first_col + the column of the highest z +
 * noise, the lowest such; score[N] is that sum and target_logit[N] its z. The noise of column
 * first_col + j in row i is the Gumbel variate of word (first_col + j) % 4 of Philox4x32-10 with
 * the counter
 * ((first_col + j) / 4, position[i]'s low and high word, 0) and the key seed[i]; with greedy it is
 * 0. A row that has no column above -inf gets token first_col and score and target_logit -inf.
 */
LATRO_API int32_t latro_cpu_linear_sample(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* seed, const int64_t* position, int64_t first_col,
    int32_t greedy, int64_t* token, float* score, float* target_logit, float* row_max,
    float* sum_exp, float* weighted_sum, int64_t N, int64_t H, int64_t V, float softcap,
    float temperature, int64_t threads);

/* few_rows_linear on the CPU: out = x . weight + bias, for few rows and at the speed of reading.
 *
 * x[N, H], bias[V] or null, and out[N, V] are contiguous, weight is [V, H] with any steps (in
 * elements), all of `dtype`; bf16_products is as in linear_logprob. Sums are fp32.
 */
LATRO_API int32_t latro_cpu_few_rows_linear(const void* x, const void* weight,
                                            int64_t weight_row_step, int64_t weight_col_step,
                                            const void* bias, void* out, int32_t dtype,
                                            int32_t bf16_products, int64_t N, int64_t H, int64_t V,
                                            int64_t threads);

/* decode_attention on the CPU: R rows read a token each, and attend to their prompt and their own.
 *
 * query[R, heads, size], key[R, key_heads, size], value[R, key_heads, value_size] and
 * out[R, heads, value_size] are contiguous, and so are the cached keys [places, key_heads, size,
 * room] and values [places, key_heads, room, value_size], all of `dtype`. Row i attends to
 * prompt_length[i] keys of place prompt[i], one of `prompts`, and in its own place i to length[i]
 * keys and to the new one, which is written behind them; of all these to the last `window` (0: to
 * all). softcap 0 is none. LATRO_OUT_OF_RANGE, and nothing is written, where a row attends to more
 * than there is room for.
 */
LATRO_API int32_t latro_cpu_decode_attention(
    const void* query, const void* key, const void* value, int32_t dtype, const void* prompt_keys,
    const void* prompt_values, int64_t prompts, int64_t prompt_room, void* own_keys,
    void* own_values, int64_t own_room, const int64_t* prompt, const int64_t* prompt_length,
    const int64_t* length, void* out, int64_t R, int64_t heads, int64_t key_heads, int64_t size,
    int64_t value_size, int64_t window, float scaling, float softcap, int64_t threads);

/* linear_logprob on CUDA: what happens to one tile of logits between the products.
 *
 * The tile holds rows x cols products, fp32, contiguous, for the vocabulary columns first_col ..
 * first_col + cols; bias[cols] or null is added to them, and z is made of them as above.
 *
 * fold: adds the tile to the rows' running state: row_max[rows] (start: -inf), sum_exp[rows]
 * (start: 0), weighted_sum[rows] or null (start: 0), with it square_sum[rows] and logit_sum[rows],
 * both or none (start: 0); target_logit[rows] is written when the target is met.
 *
 * grad: turns the tile into the gradient with respect to the products, written to dtile in the
 * dtype of the products to come (dtile may be the tile where that is fp32). log_sum is
 * log(sum_exp); grad_entropy, offset and grad_square are as in latro_cpu_linear_logprob_backward.
 */
LATRO_API int32_t latro_cuda_linear_logprob_fold(
    const float* tile, const float* bias, const int64_t* target, float* row_max, float* sum_exp,
    float* target_logit, float* weighted_sum, float* square_sum, float* logit_sum, int64_t rows,
    int64_t cols, int64_t first_col, float softcap, float temperature, void* stream);

LATRO_API int32_t latro_cuda_linear_logprob_grad(
    const float* tile, void* dtile, int32_t dtype, const float* bias, const int64_t* target,
    const float* grad_logp, const float* grad_entropy, const float* logp, const float* offset,
    const float* grad_square, const float* row_max, const float* log_sum, int64_t rows,
    int64_t cols, int64_t first_col, float softcap, float temperature, void* stream);

/* linear_sample on CUDA: the column of a tile of products that has the highest z + noise.
 *
 * The tile, bias, first_col, softcap and temperature are as in the fold of linear_logprob, which is
 * called after it with token as the target. The noise of row i is as in latro_cpu_linear_sample,
 * the number of a column being first_col + its column of the tile + *first, which lies on the
 * device (null: 0). Where the highest is above score[rows] (start: -inf) it takes its place, and
 * its column, counted from that of *first, the place of token[rows]; of several the lowest.
 * Scratch: part_score and part_column, rows for each of (cols + 3) / LATRO_SAMPLE_PART_COLS + 1
 * parts. rows is at most 65535.
 */
LATRO_API int32_t latro_cuda_linear_sample_draw(const float* tile, const float* bias,
                                                const int64_t* seed, const int64_t* position,
                                                const int64_t* first, int32_t greedy, float* score,
                                                int64_t* token, float* part_score,
                                                int64_t* part_column, int64_t rows, int64_t cols,
                                                int64_t first_col, float softcap, float temperature,
                                                void* stream);

/* gather_logprob: log-probabilities of one token a row from logits that exist, and their gradient.
 *
 * logits[rows, cols] of type dtype, rows row_step elements apart; dlogits alike, with drow_step. No
 * alignment is asked for beyond an element's. dlogits may be logits, with the same step.
 * softcap 0 means none. z = softcap * tanh(logit / softcap) / temperature.
 *
 * forward: target[rows], in 0 .. cols - 1; writes logp[rows]; row_max[rows], the maximum of z;
 * log_sum[rows], log of the sum of exp(z - row_max); target_logit[rows], z at the target;
 * entropy[rows] unless null; with it, both or none, log_sum_p_squared[rows], log of the sum of
 * softmax(z)^2, and mean_logit[rows], the mean of z. A row whose target is below 0 is not read, and
 * gets zeros.
 *
 * backward: takes logp, row_max and log_sum back; grad_entropy, offset and grad_square are as in
 * latro_cpu_linear_logprob_backward. A row in which these and grad_logp are 0 is not read.
 */
LATRO_API int32_t latro_cpu_gather_logprob_forward(
    const void* logits, int32_t dtype, int64_t row_step, const int64_t* target, float* logp,
    float* entropy, float* log_sum_p_squared, float* mean_logit, float* row_max, float* log_sum,
    float* target_logit, int64_t rows, int64_t cols, float softcap, float temperature,
    int64_t threads);

LATRO_API int32_t latro_cpu_gather_logprob_backward(
    const void* logits, void* dlogits, int32_t dtype, int64_t row_step, int64_t drow_step,
    const int64_t* target, const float* grad_logp, const float* grad_entropy, const float* logp,
    const float* offset, const float* grad_square, const float* row_max, const float* log_sum,
    int64_t rows, int64_t cols, float softcap, float temperature, int64_t threads);

LATRO_API int32_t latro_cuda_gather_logprob_forward(const void* logits, int32_t dtype,
                                                    int64_t row_step, const int64_t* target,
                                                    float* logp, float* entropy,
                                                    float* log_sum_p_squared, float* mean_logit,
                                                    float* row_max, float* log_sum,
                                                    float* target_logit, int64_t rows, int64_t cols,
                                                    float softcap, float temperature, void* stream);

LATRO_API int32_t latro_cuda_gather_logprob_backward(
    const void* logits, void* dlogits, int32_t dtype, int64_t row_step, int64_t drow_step,
    const int64_t* target, const float* grad_logp, const float* grad_entropy, const float* logp,
    const float* offset, const float* grad_square, const float* row_max, const float* log_sum,
    int64_t rows, int64_t cols, float softcap, float temperature, void* stream);

/* linear_kl, whole, on the CPU: KL(p || q) of N rows of two heads over one vocabulary.
 *
 * hidden_*[N, H_*] and weight_*[V, H_*] are of `dtype`, contiguous; weight_q is null where it is
 * weight_p. bias_*[V] or null; bf16_products, and each head's softcap and temperature, are as in
 * linear_logprob.
 *
 * forward fills kl[N]; max_*[N], the maximum of z_*; sum_exp_*[N], the sum of exp(z_* - max_*);
 * anchor[N], z_q in the column of max_p; and mean[N], the mean of z_p - z_q under p less
 * max_p - anchor.
 *
 * backward makes the gradient of one head, which is q where of_q is not 0: `hidden`, `weight`,
 * `bias`, H, softcap and temperature are that head's, the others the other one's, whose weight is
 * null where both have one. It goes over the M rows whose numbers `rows` names (null: all,
 * 0 .. M - 1) and fills dx[., H] in those rows, dw[V, H] in `dtype` and db[V], each or null.
 */
LATRO_API int32_t latro_cpu_linear_kl_forward(
    const void* hidden_p, const void* weight_p, const float* bias_p, int64_t H_p, float softcap_p,
    float temperature_p, const void* hidden_q, const void* weight_q, const float* bias_q,
    int64_t H_q, float softcap_q, float temperature_q, int32_t dtype, int32_t bf16_products,
    float* kl, double* anchor, double* mean, double* max_p, double* sum_exp_p, double* max_q,
    double* sum_exp_q, int64_t N, int64_t V, int64_t threads);

LATRO_API int32_t latro_cpu_linear_kl_backward(
    const void* hidden, const void* weight, const float* bias, int64_t H, float softcap,
    float temperature, const void* hidden_other, const void* weight_other, const float* bias_other,
    int64_t H_other, float softcap_other, float temperature_other, int32_t dtype,
    int32_t bf16_products, int32_t of_q, const int64_t* rows, const float* grad_kl,
    const double* anchor, const double* mean, const double* max_p, const double* sum_exp_p,
    const double* max_q, const double* sum_exp_q, float* dx, void* dw, float* db, int64_t M,
    int64_t V, int64_t threads);

/* linear_kl on CUDA: what happens to one tile of logits of each head between the products.
 *
 * Both tiles hold rows x cols products, contiguous, of the same vocabulary columns; bias_*[cols] or
 * null is added to them, and each head's softcap and temperature are as in linear_logprob. dp and
 * dq below are a logit's distances from its head's maximum.
 *
 * fold: adds the tiles to the rows' running state, [rows] each: max_*, the maximum of z (start:
 * -inf); anchor, zq in the column of max_p; sum_exp_*, the sum of exp(d*); moment, the sum of
 * exp(dp) * (zp - zq - (max_p - anchor)); second, the sum of exp(dp) * (exp(dq - dp) - 1 + dp - dq)
 * (start: 0).
 *
 * grad: writes the gradient with respect to p's products, or q's where of_q is not 0, into dtile,
 * in the dtype of the products to come (it may be that head's tile where that is fp32). mean is
 * moment / sum_exp_p.
 */
LATRO_API int32_t latro_cuda_linear_kl_fold(const float* tile_p, const float* tile_q,
                                            const float* bias_p, const float* bias_q, float* max_p,
                                            float* sum_exp_p, float* max_q, float* sum_exp_q,
                                            float* anchor, float* moment, float* second,
                                            int64_t rows, int64_t cols, float softcap_p,
                                            float temperature_p, float softcap_q,
                                            float temperature_q, void* stream);

LATRO_API int32_t latro_cuda_linear_kl_grad(
    const float* tile_p, const float* tile_q, const float* bias_p, const float* bias_q, void* dtile,
    int32_t dtype, int32_t of_q, const float* grad_kl, const float* anchor, const float* mean,
    const float* max_p, const float* sum_exp_p, const float* max_q, const float* sum_exp_q,
    int64_t rows, int64_t cols, float softcap_p, float temperature_p, float softcap_q,
    float temperature_q, void* stream);

/* What a status that a CUDA launcher returned means. */
LATRO_API const char* latro_cuda_error_string(int32_t status);

#endif /* LATRO_H_ */
