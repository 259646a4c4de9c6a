/* CPU kernels: local response normalization across maps, alone or between a ReLU and a max pooling;
   normalization over neighboring pixels; padding of images for the first convolution.

   native.py compiles and calls them, and explains their arguments. kernels.inc holds the functions;
   it is included once for each number type. Each pass goes over memory once: blocks of the input
   are widened into buffers that stay in the first- or second-level cache, and everything between
   the input and the output happens there.

   A block is `count` runs of `maps` numbers; a run is the maps of one column at one pixel. Its
   buffer keeps two zeros before the first run and after every run: so a window of five maps needs
   no test for the end of its column, and all loops except loading and storing treat the buffer as
   one row. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef uint16_t bfloat16;

enum { EDGE = 2, LANES = 16, BLOCK = 1536, MOST_WINDOW = 4, MOST_TAPS = 16,
       REACH = 2, SPAN = 5, AT_ONCE = 32, COLORS = 3 };

static inline float wide_bfloat16(bfloat16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline bfloat16 narrow_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  /* to nearest even */
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bfloat16)rounded;
}

/* s -> s^-.75 and, if wanted, 1/s. The arrays have room for LANES more than n. */
static void powers_double(const double *restrict s, double *restrict power,
                          double *restrict inverse, long n) {
    for (long i = 0; i < n; i++) {
        const double root = 1.0 / sqrt(s[i]);
        power[i] = root * sqrt(root);
        if (inverse) inverse[i] = 1.0 / s[i];
    }
}

static void powers_float(const float *restrict s, float *restrict power, float *restrict inverse,
                         long n) {
#if defined(__AVX512F__)
    /* Estimates of 14 bits, then one Newton step: a tenth of the time of roots and divisions.
       With p near s^-.75, e = 1 - p^4 s^3, and p + p e / 4 has twice the bits. */
    const __m512 one = _mm512_set1_ps(1.0f), quarter = _mm512_set1_ps(0.25f);
    for (long i = 0; i < n; i += LANES) {
        const __m512 v = _mm512_loadu_ps(s + i);
        const __m512 root = _mm512_rsqrt14_ps(v);
        const __m512 p = _mm512_mul_ps(_mm512_mul_ps(root, root), _mm512_rsqrt14_ps(root));
        const __m512 fourth = _mm512_mul_ps(p, v); /* v^.25: neither this nor its cube overflow */
        const __m512 e = _mm512_fnmadd_ps(_mm512_mul_ps(fourth, fourth),
                                          _mm512_mul_ps(fourth, p), one);
        _mm512_storeu_ps(power + i, _mm512_fmadd_ps(_mm512_mul_ps(p, e), quarter, p));
        if (inverse) {
            const __m512 r = _mm512_rcp14_ps(v);
            _mm512_storeu_ps(inverse + i, _mm512_fmadd_ps(r, _mm512_fnmadd_ps(r, v, one), r));
        }
    }
#else
    for (long i = 0; i < n; i++) {
        const float root = 1.0f / sqrtf(s[i]);
        power[i] = root * sqrtf(root);
        if (inverse) inverse[i] = root * root;
    }
#endif
}

#define SAME(x) (x)
#define JOIN(a, b) a##_##b
#define NAMED(a, b) JOIN(a, b)

#define SUFFIX bfloat16
#define T bfloat16
#define A float
#define WIDE wide_bfloat16
#define NARROW narrow_bfloat16
#define POWERS powers_float
#include "kernels.inc"

#define SUFFIX float32
#define T float
#define A float
#define WIDE SAME
#define NARROW SAME
#define POWERS powers_float
#include "kernels.inc"

#define SUFFIX float64
#define T double
#define A double
#define WIDE SAME
#define NARROW SAME
#define POWERS powers_double
#include "kernels.inc"
