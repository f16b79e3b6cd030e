/* The interface of a C kernel that `python -m bench run --against path/lib.so:symbol` measures.
 *
 * The function has the type gemmconv_bench_kernel. It computes, in float,
 *
 *     y[b][i*stride + a*dilation - before][co] += sum over ci of x[b][i][ci] * w[a][co][ci]
 *
 * on each of the axes depth, height and width, for every input position i and every tap a. Cells outside of the output
 * are dropped, cells that nothing reaches are 0. `output` is not initialised: every cell must be written.
 *
 * It returns 0, or any other number for a problem it cannot do, which is reported as an error of its own. It is called
 * from one thread at a time and should use `threads` threads. Arrays are aligned to their elements only.
 *
 * Compile with, for instance: cc -O3 -march=native -shared -fPIC kernel.c -o kernel.so
 */
#ifndef GEMMCONV_BENCH_H
#define GEMMCONV_BENCH_H

#include <stdint.h>

#define GEMMCONV_BENCH_VERSION 1

struct gemmconv_bench_problem {
    int64_t version;           /* GEMMCONV_BENCH_VERSION */
    int64_t threads;           /* to use */
    int64_t batch, cin, cout;
    int64_t input[3];          /* depth, height, width, as all triples */
    int64_t output[3];
    int64_t kernel[3];
    int64_t stride[3];
    int64_t dilation[3];
    int64_t before[3];         /* padding in front: what is subtracted above */
    int64_t value_strides[5];  /* in elements, of N, D, H, W, C, whatever the layout */
    int64_t filter_strides[5]; /* in elements, of kd, kh, kw, Cout, Cin */
    int64_t output_strides[5]; /* in elements, of N, D, H, W, C */
};

typedef int gemmconv_bench_kernel(const struct gemmconv_bench_problem *problem, const float *value,
                                  const float *filter, float *output);

#endif
