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
};

/* Element types. */
enum {
  LATRO_F32 = 0,
  LATRO_BF16 = 1,
  LATRO_F16 = 2,
};

/* group_advantage: a coefficient per row from the log-probabilities of G groups of K sequences.
 *
 * logp[N]; ref_logp[N] or null, read on rationale rows only; offsets[2·G·K + 1], ascending from 0
 * to N, two segments a sequence: rationale, answer; finished[G·K] or null for all; six outputs,
 * five of [G·K] and coefficient[N]; rewards[G·K] is scratch. scale is 1 / (prompts·K) of the whole
 * update. kl_in_loss: 0, the KL is part of the reward; 1, it is a k3 term of the loss.
 * exclude_unfinished: 0, an unfinished sequence has the lowest reward of its group; 1, it is left
 * out.
 */
LATRO_API int32_t latro_cpu_group_advantage_forward(
    const float* logp, const float* ref_logp, const int64_t* offsets, const uint8_t* finished,
    float* reward, float* answer_logp, float* rationale_logp, float* kl, float* advantage,
    float* coefficient, double* rewards, int64_t G, int64_t K, double scale, double beta,
    double answer_weight, int32_t kl_in_loss, int32_t exclude_unfinished, int64_t threads);

LATRO_API int32_t latro_cuda_group_advantage_forward(
    const float* logp, const float* ref_logp, const int64_t* offsets, const uint8_t* finished,
    float* reward, float* answer_logp, float* rationale_logp, float* kl, float* advantage,
    float* coefficient, double* rewards, int64_t G, int64_t K, double scale, double beta,
    double answer_weight, int32_t kl_in_loss, int32_t exclude_unfinished, void* stream);

/* linear_logprob: what happens to one tile of logits between the products.
 *
 * The tile holds rows x cols products hidden . weight, contiguous, for the vocabulary columns
 * first_col .. first_col + cols; bias[cols] or null is added to them. softcap 0 means none.
 * z = softcap * tanh((product + bias) / softcap) / temperature.
 *
 * fold: adds the tile to the rows' running state: peak[rows], the maximum of z (start: -inf);
 * total[rows], the sum of exp(z - peak) (start: 0); weighted[rows] or null, the sum of
 * exp(z - peak) * (z - peak) (start: 0); picked[rows], z at the target, written when it is met.
 *
 * grad: turns the tile into the gradient with respect to the products. log_total is log(total);
 * grad_entropy and entropy are null when the entropy was not asked for. The CPU works in place;
 * CUDA reads an fp32 tile and writes dtile in the dtype of the products to come (dtile may be the
 * tile where that is fp32).
 */
LATRO_API int32_t latro_cpu_linear_logprob_fold(const void* tile, int32_t dtype, const float* bias,
                                                const int64_t* target, float* peak, float* total,
                                                float* picked, float* weighted, int64_t rows,
                                                int64_t cols, int64_t first_col, float softcap,
                                                float temperature, int64_t threads);

LATRO_API int32_t latro_cpu_linear_logprob_grad(void* tile, int32_t dtype, const float* bias,
                                                const int64_t* target, const float* grad_logp,
                                                const float* grad_entropy, const float* logp,
                                                const float* entropy, const float* peak,
                                                const float* log_total, int64_t rows, int64_t cols,
                                                int64_t first_col, float softcap, float temperature,
                                                int64_t threads);

LATRO_API int32_t latro_cuda_linear_logprob_fold(const float* tile, const float* bias,
                                                 const int64_t* target, float* peak, float* total,
                                                 float* picked, float* weighted, int64_t rows,
                                                 int64_t cols, int64_t first_col, float softcap,
                                                 float temperature, void* stream);

LATRO_API int32_t latro_cuda_linear_logprob_grad(const float* tile, void* dtile, int32_t dtype,
                                                 const float* bias, const int64_t* target,
                                                 const float* grad_logp, const float* grad_entropy,
                                                 const float* logp, const float* entropy,
                                                 const float* peak, const float* log_total,
                                                 int64_t rows, int64_t cols, int64_t first_col,
                                                 float softcap, float temperature, void* stream);

/* matmul_bf16: c[rows, cols] = a[rows, length] . b[length, cols], or += with accumulate; bf16
 * operands with any steps (in elements), fp32 sums and an fp32 result, contiguous. Needs a
 * processor for which `supported` is 1.
 */
LATRO_API int32_t latro_cpu_matmul_bf16_supported(void);

LATRO_API int32_t latro_cpu_matmul_bf16(const void* a, int64_t a_row_step, int64_t a_k_step,
                                        const void* b, int64_t b_k_step, int64_t b_col_step,
                                        float* c, int64_t rows, int64_t cols, int64_t length,
                                        int32_t accumulate, int64_t threads);

/* What a status that a CUDA launcher returned means. */
LATRO_API const char* latro_cuda_error_string(int32_t status);

#endif /* LATRO_H_ */
