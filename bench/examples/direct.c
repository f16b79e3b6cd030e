/* cc -O3 -march=native -shared -fPIC -I bench bench/examples/direct.c -o direct.so; --against direct.so:direct */
#include "gemmconv_bench.h"

int direct(const struct gemmconv_bench_problem *p, const float *value, const float *filter, float *output) {
    const int64_t *v = p->value_strides, *f = p->filter_strides, *y = p->output_strides, *n = p->input, *o = p->output;
    for (int64_t i = 0; i < p->batch * o[0] * o[1] * o[2] * p->cout; i++) output[i] = 0;
    for (int64_t b = 0; b < p->batch; b++)
    for (int64_t i = 0; i < n[0] * n[1] * n[2]; i++)
    for (int64_t t = 0; t < p->kernel[0] * p->kernel[1] * p->kernel[2]; t++) {
        int64_t at[3] = {i / n[2] / n[1], i / n[2] % n[1], i % n[2]}, outside = 0;
        int64_t tap[3] = {t / p->kernel[2] / p->kernel[1], t / p->kernel[2] % p->kernel[1], t % p->kernel[2]};
        const float *x = value + b * v[0] + at[0] * v[1] + at[1] * v[2] + at[2] * v[3];
        const float *w = filter + tap[0] * f[0] + tap[1] * f[1] + tap[2] * f[2];
        for (int a = 0; a < 3; a++) {
            at[a] = at[a] * p->stride[a] + tap[a] * p->dilation[a] - p->before[a];
            outside |= at[a] < 0 || at[a] >= o[a];
        }
        float *to = output + b * y[0] + at[0] * y[1] + at[1] * y[2] + at[2] * y[3];
        for (int64_t co = 0; co < (outside ? 0 : p->cout); co++)
            for (int64_t ci = 0; ci < p->cin; ci++)
                to[co * y[4]] += x[ci * v[4]] * w[co * f[3] + ci * f[4]];
    }
    return 0;
}
