/* Plain C interface of the CPU kernels: no torch headers, so it builds in seconds and outlives torch's ABI.
 *
 * Every function returns FS_OK or an error code and touches no memory outside what its arguments
 * describe. Strides count elements. A tensor [B, C, N] (N positions, H * W of them) is given by a pointer and
 * its batch, channel and position strides; channels-last has channel stride 1, contiguous has position
 * stride 1, and one of the two must hold. Statistics and sums are fp32 or wider whatever the dtype.
 * All functions may be called from several threads at once.
 */
#ifndef FASTSCORE_NATIVE_H
#define FASTSCORE_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FS_ABI 2

/* what a function returns */
#define FS_OK 0
#define FS_BAD_ARGUMENT 1 /* a size, stride or code that no tensor can have */
#define FS_NO_MEMORY 2
#define FS_UNSUPPORTED 3 /* an instruction set that this build or processor lacks */

/* element types */
#define FS_F32 0
#define FS_BF16 1
#define FS_F16 2

int fs_abi(void);

/* the instruction set in use: "avx512", "avx2", "neon" or "portable" */
const char* fs_isa(void);
/* "auto", or one of the above: FS_UNSUPPORTED where this build or processor lacks it */
int fs_set_isa(const char* name);
/* upper bound of threads, 0: as many as OpenMP would take */
void fs_set_threads(int threads);

/* y = act((1 + scale) * (weight * (x - mean) * rstd + bias) + shift), statistics over each group's
 * channels and positions. film is [B, 2C] (scale, then shift) with row stride film_stride, or NULL.
 * mean, rstd [B, groups] fp32 are written, for the backward pass; either may be NULL. */
int fs_norm_act(const void* x, int64_t x_batch, int64_t x_channel, int64_t x_position,  //
                void* y, int64_t y_batch, int64_t y_channel, int64_t y_position,        //
                int dtype, const void* weight, const void* bias, int parameter_dtype,   //
                const void* film, int64_t film_stride, int film_dtype,                  //
                float* mean, float* rstd,                                               //
                int64_t batch, int64_t channels, int64_t positions, int64_t groups, int act, double eps);

/* Vector-Jacobian product of fs_norm_act. grad and grad_x hold `copies` cotangents of each sample:
 * [copies * B, C, N], sample i % B belongs to row i. grad_x may be NULL. sums, when not NULL, is
 * [2, copies * B, C] fp32: the sums over positions of dz and of dz * xhat, where dz is the cotangent
 * of what enters the activation and xhat = (x - mean) * rstd; parameter gradients follow from them. */
int fs_norm_act_backward(const void* grad, int64_t g_batch, int64_t g_channel, int64_t g_position,  //
                         const void* x, int64_t x_batch, int64_t x_channel, int64_t x_position,     //
                         void* grad_x, int64_t o_batch, int64_t o_channel, int64_t o_position,      //
                         int dtype, const void* weight, const void* bias, int parameter_dtype,      //
                         const void* film, int64_t film_stride, int film_dtype,                     //
                         const float* mean, const float* rstd, float* sums,                         //
                         int64_t batch, int64_t copies, int64_t channels, int64_t positions, int64_t groups,
                         int act);

/* Taps [B, 2C, N] channels-last, position stride taps_position >= 2C: the group-normalised feature in
 * the first C channels and the gradient, divided by its per-sample RMS (at least 1e-30) and
 * group-normalised, in the last C. log_rms [B] fp32. stats, when not NULL, is [B, groups, 4] fp32: mean
 * and rstd of the feature, mean and rstd of the gradient, the latter two for the raw gradient:
 * xhat = (gradient - mean) * rstd with rstd = 1 / sqrt(var + eps * rms^2). */
int fs_tap_norm(const void* feature, int64_t f_batch, int64_t f_channel, int64_t f_position,     //
                const void* gradient, int64_t g_batch, int64_t g_channel, int64_t g_position,    //
                void* taps, int64_t taps_batch, int64_t taps_position, int dtype,                //
                const void* feature_weight, const void* feature_bias,                            //
                const void* gradient_weight, const void* gradient_bias, int parameter_dtype,     //
                float* log_rms, float* stats,                                                    //
                int64_t batch, int64_t channels, int64_t positions, int64_t groups, double eps);

/* Attention of queries [B, C, N] over the keys and values of one or two taps, each [B, 2C, N] with keys
 * in the first C channels; all channels-last (channel stride 1). With spatial every query attends to
 * the positions of all taps, without only to its own position's token in each. Scale 1 / sqrt(C / heads).
 * second may be NULL. */
int fs_tap_fuse(const void* query, int64_t q_batch, int64_t q_position,      //
                const void* first, int64_t first_batch, int64_t first_position,    //
                const void* second, int64_t second_batch, int64_t second_position, //
                void* out, int64_t out_batch, int64_t out_position, int dtype,     //
                int64_t batch, int64_t channels, int64_t positions, int64_t heads, int spatial);

/* Vector-Jacobian product of fs_tap_fuse; every gradient has the shape of what it belongs to. */
int fs_tap_fuse_backward(const void* grad, int64_t grad_batch, int64_t grad_position,  //
                         const void* query, int64_t q_batch, int64_t q_position,      //
                         const void* first, int64_t first_batch, int64_t first_position,     //
                         const void* second, int64_t second_batch, int64_t second_position,  //
                         void* grad_query, int64_t gq_batch, int64_t gq_position,            //
                         void* grad_first, int64_t gfirst_batch, int64_t gfirst_position,    //
                         void* grad_second, int64_t gsecond_batch, int64_t gsecond_position, int dtype,
                         int64_t batch, int64_t channels, int64_t positions, int64_t heads, int spatial);

/* One scale of the tap path: taps = tap_norm(feature, gradient), then
 *   out = skip(taps) + proj(tap_fuse(query(taps[:C]), key_value_f(taps[:C]), key_value_g(taps[C:]))).
 * feature, gradient [B, C, N], out [B, W, N], all channels-last. Weights are row-major [out, in] in
 * parameter_dtype: query [W, C], kv_feature and kv_gradient [2W, C], skip [W, 2C], proj [W, W], each
 * with its bias. */
int fs_tap_path(const void* feature, int64_t f_batch, int64_t f_position,                  //
                const void* gradient, int64_t g_batch, int64_t g_position,                 //
                void* out, int64_t out_batch, int64_t out_position, int dtype,             //
                const void* feature_weight, const void* feature_bias,                      //
                const void* gradient_weight, const void* gradient_bias,                    //
                const void* query_weight, const void* query_bias,                          //
                const void* kv_feature_weight, const void* kv_feature_bias,                //
                const void* kv_gradient_weight, const void* kv_gradient_bias,              //
                const void* skip_weight, const void* skip_bias,                            //
                const void* proj_weight, const void* proj_bias, int parameter_dtype,       //
                float* log_rms,                                                            //
                int64_t batch, int64_t channels, int64_t width, int64_t positions, int64_t groups,
                int64_t heads, int spatial, double eps);

/* One step of a sampler in one pass over memory. With per-sample coefficients [B, 7] fp32
 * (c_skip, c_out, weight, keep, pull, pull_old, kick), all [B, size]:
 *   x0     = c_skip * x + c_out * raw (+ weight * guidance)
 *   x_next = keep * x + pull * x0 (+ pull_old * old) (+ kick * z)
 * evaluated in fp32 in exactly this order, each product and each sum rounded on its own. raw and guidance
 * have raw_dtype; raw NULL means that x0 is given in `denoised` instead; guidance, old NULL: their terms
 * are left out; counters [B, 3] int64 (seed, sample, step) NULL: no noise. z is that of fs_normals with
 * the counters of its sample. x_next or x0 may be NULL. */
int fs_solver_step(const float* x, const void* raw, const void* guidance, int raw_dtype, const float* denoised,
                   const float* old, const float* coefficients, const int64_t* counters, int64_t draw,
                   float* x_next, float* x0, int64_t batch, int64_t size);

/* Standard normals [S, B, size] fp32: number j of step s and sample b is number j % 4 of Philox 4x32-10
 * block (j / 4, steps[s], samples[b], draw) under key seeds[b], by Box-Muller in double precision. The
 * bits are those of the reference, on every processor. */
int fs_normals(const int64_t* seeds, const int64_t* samples, const int64_t* steps, int64_t draw, float* out,
               int64_t step_count, int64_t batch, int64_t size);

/* y = convolution of x with a 3 x 3 kernel, stride 1, padding 1, and bias, by Winograd's F(2 x 2, 3 x 3).
 * x [B, H, W, in] and y [B, H, W, out] dense fp32, bias [out] or NULL. `packed` comes from
 * fs_winograd_pack under the same instruction set, else FS_UNSUPPORTED: 16 + 16 * in * (out rounded up
 * to a multiple of 16) floats, of transformed kernels U [16, out, in] = G g G^T, row after row. */
int fs_winograd_pack(const float* transformed, float* packed, int64_t in, int64_t out);
int fs_winograd(const float* x, const float* packed, const float* bias, float* y, int64_t batch,
                int64_t height, int64_t width, int64_t in, int64_t out);

/* y [rows, out] = x [rows, in] times the transpose of weight [out, in], plus bias, dense fp32. `packed` comes
 * from fs_linear_pack under the same instruction set, else FS_UNSUPPORTED: 16 + (in + 1) * (out rounded up
 * to a multiple of 16) floats; bias [out] may be NULL there. A row's bits do not depend on the others. */
int fs_linear_pack(const float* weight, int64_t out_stride, int64_t in_stride, const float* bias, float* packed,
                   int64_t in, int64_t out);
int fs_linear(const float* x, const float* packed, float* y, int64_t rows, int64_t in, int64_t out);

#ifdef __cplusplus
}
#endif

#endif /* FASTSCORE_NATIVE_H */
