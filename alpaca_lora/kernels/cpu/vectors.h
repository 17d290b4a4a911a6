/* Vectors of floats as wide as the processor's: the compiler's own, which it has for every processor. */

#ifndef VECTORS_H
#define VECTORS_H

#include <stdint.h>
#include <string.h>

/* a product and a sum may be one instruction in what follows: nobody else computes the same bits */
#ifdef __clang__
#pragma clang fp contract(fast)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#pragma GCC optimize("fp-contract=fast")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

#if defined(__AVX512F__)
#define LANES 16
#define QUARTERS(f) f(0), f(4), f(8), f(12)
#elif defined(__AVX__)
#define LANES 8
#define QUARTERS(f) f(0), f(4)
#else
#define LANES 4
#define QUARTERS(f) f(0)
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE Floats load(const void *row, int64_t i, const int is_bfloat16) {
    if (is_bfloat16) {
        Halves halves;
        memcpy(&halves, (const uint16_t *)row + i, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
    }
    Floats floats;
    memcpy(&floats, (const float *)row + i, sizeof floats);
    return floats;
}

INLINE void store(float *to, Floats floats) { memcpy(to, &floats, sizeof floats); }

INLINE Floats larger(Floats a, Floats b) { /* b where one is no number */
    Ints chosen = a > b;
    return (Floats)(((Ints)a & chosen) | ((Ints)b & ~chosen));
}

/* 2^x for x <= 0: 0 below -126; what is no number stays none. Error 2e-7 (the polynomial is Cephes', of |x| <= 1/2) */
INLINE Floats power(Floats x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: a sum with it is rounded to a whole number, in its lowest bits */
    Floats shifted = x + magic, rest = x - (shifted - magic);
    Floats y = rest * 1.535336188319500e-4f + 1.339887440266574e-3f;
    y = y * rest + 9.618437357674640e-3f;
    y = y * rest + 5.550332471162809e-2f;
    y = y * rest + 2.402264791363012e-1f;
    y = y * rest + 6.931472028550421e-1f;
    y = y * rest + 1.0f;
    y *= (Floats)(((Words)shifted << 23) + (127u << 23));
    return (Floats)((Ints)y & ~(x < -126.0f));
}

INLINE float power_of(float x) {
    Floats all = power((Floats){x});
    return all[0];
}

#define LOW(j) j, LANES + j, j + 1, LANES + j + 1
#define HIGH(j) j + 2, LANES + j + 2, j + 3, LANES + j + 3
#define FRONT(j) j, j + 1, LANES + j, LANES + j + 1
#define BACK(j) j + 2, j + 3, LANES + j + 2, LANES + j + 3

/* the sums of four vectors, to four floats; three operations for each vector where one by one takes eight */
INLINE void sum_four(const Floats *a, float *to) {
    Floats ab = SHUFFLE(a[0], a[1], QUARTERS(LOW)) + SHUFFLE(a[0], a[1], QUARTERS(HIGH));
    Floats cd = SHUFFLE(a[2], a[3], QUARTERS(LOW)) + SHUFFLE(a[2], a[3], QUARTERS(HIGH));
    Floats sum = SHUFFLE(ab, cd, QUARTERS(FRONT)) + SHUFFLE(ab, cd, QUARTERS(BACK));
#if LANES == 16
    sum += SHUFFLE(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sum += SHUFFLE(sum, sum, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif LANES == 8
    sum += SHUFFLE(sum, sum, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
    memcpy(to, &sum, 4 * sizeof(float));
}

#endif
