/* Ops on a few rows, as decoding has them, where a call of torch's costs more than the work in it.

       multiply_dense    y = x W^T of several matrices that share x
       add_low_rank      y += s (x A^T) B^T of several matrices that share x, each row with its own A, B and s
       norm_rows         y = (x / rms(x)) * (offset + weight)
       rotate_rows       y1 = x1 cos1 - x2 sin1,  y2 = x2 cos2 + x1 sin2
       gate_rows         y = act(gate) * up,  act(g) = g sigmoid(z),  z = g (SwiGLU) or as below (GeGLU)

   In float inside, and rounded to bfloat16 where torch rounds. A row's numbers depend neither on the number of threads nor
   on the other rows in the call: every sum has the same order. */

#include <math.h>
#include <stdlib.h>

#include "bfloat16.h"
#include "threads.h"
#include "vectors.h"

#define TOKENS 8 /* multiplied at once: with two rows of weights their sums fill the registers */

INLINE void put(void *to, int64_t i, float value, const int is_bfloat16) {
    if (is_bfloat16) ((uint16_t *)to)[i] = to_bfloat16(value);
    else ((float *)to)[i] = value;
}

INLINE float get(const void *from, int64_t i, const int is_bfloat16) {
    return is_bfloat16 ? from_bfloat16(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE float rounded(float value, const int is_bfloat16) {
    return is_bfloat16 ? from_bfloat16(to_bfloat16(value)) : value;
}

/* ---- products ---- */

typedef struct {
    const char *weight; /* (out_features, in_features) */
    void *out;          /* (tokens, out_features) */
    int64_t out_features;
} Matrix;

typedef struct {
    const Matrix *matrices;
    const float *x; /* (tokens, in_features) */
    int64_t num_tokens, in_features;
    int is_bfloat16;
} Product;

/* rows [row, row + R) of a matrix with tokens [token, token + T) */
INLINE void multiply_some(
    const Product *job, const Matrix *matrix, int64_t row, int64_t token, const int R, const int T,
    const int is_bfloat16, const int stays_wide
) {
    const int64_t inputs = job->in_features, row_bytes = inputs * (is_bfloat16 ? 2 : 4);
    const char *weight = matrix->weight + row * row_bytes;
    const float *x = job->x + token * inputs;
    Floats sums[(8 * TOKENS + 3) / 4 * 4];
    float totals[(8 * TOKENS + 3) / 4 * 4];
    const int count = (R * T + 3) / 4 * 4;
    for (int k = 0; k < count; k++) sums[k] = (Floats){0};
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        Floats w[8];
        for (int r = 0; r < R; r++) {
            w[r] = load(weight + r * row_bytes, i, is_bfloat16);
            /* the next rows: a row is too short for the processor to see where it leads */
            __builtin_prefetch(weight + (R + r) * row_bytes + i * (is_bfloat16 ? 2 : 4));
        }
        for (int t = 0; t < T; t++) {
            Floats some = load(x + t * inputs, i, 0);
            for (int r = 0; r < R; r++) sums[r * T + t] += w[r] * some;
        }
    }
    for (int k = 0; k < count; k += 4) sum_four(sums + k, totals + k);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float sum = totals[r * T + t];
            for (int64_t j = i; j < inputs; j++) sum += get(weight + r * row_bytes, j, is_bfloat16) * x[t * inputs + j];
            put(matrix->out, (token + t) * matrix->out_features + row + r, sum, is_bfloat16 && !stays_wide);
        }
}

/* one token with all rows of a matrix, into floats */
INLINE void multiply_wide(const Product *job, const Matrix *matrix, int64_t rows, const int is_bfloat16) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_some(job, matrix, row, 0, 8, 1, is_bfloat16, 1);
    for (; row < rows; row++) multiply_some(job, matrix, row, 0, 1, 1, is_bfloat16, 1);
}

#define ROWS(R, T)                                                                                \
    for (; row + R <= last; row += R) multiply_some(job, matrix, row, token, R, T, is_bfloat16, 0); \
    for (; row < last; row++) multiply_some(job, matrix, row, token, 1, T, is_bfloat16, 0);         \
    break;

INLINE void multiply_span(
    const Product *job, const Matrix *matrix, int64_t row, int64_t last, int64_t token, int64_t count,
    const int is_bfloat16
) {
    switch (count) {
    case 1: ROWS(8, 1)
    case 2: ROWS(4, 2)
    case 3: ROWS(4, 3)
    case 4: ROWS(4, 4)
    case 5: ROWS(2, 5)
    case 6: ROWS(2, 6)
    case 7: ROWS(2, 7)
    default: ROWS(2, 8)
    }
}

#define SPAN 64 /* rows that all tokens are multiplied with before the next ones: they stay in the second cache */

static void multiply_rows(const void *argument, int64_t first, int64_t last) {
    const Product *job = argument;
    const Matrix *matrix = job->matrices;
    for (int64_t before = 0; first < last; before += matrix++->out_features) {
        int64_t end = last - before < matrix->out_features ? last - before : matrix->out_features;
        for (int64_t row = first - before; row < end; row += SPAN) {
            int64_t stop = row + SPAN < end ? row + SPAN : end;
            for (int64_t token = 0; token < job->num_tokens; token += TOKENS) {
                int64_t count = job->num_tokens - token < TOKENS ? job->num_tokens - token : TOKENS;
                if (job->is_bfloat16) multiply_span(job, matrix, row, stop, token, count, 1);
                else multiply_span(job, matrix, row, stop, token, count, 0);
            }
        }
        if (first < before + end) first = before + end;
    }
}

/* x: (tokens, in_features); 0: done, 1: no memory */
int multiply_dense(
    const Matrix *matrices, int64_t num_matrices, const void *x, int64_t num_tokens, int64_t in_features,
    int is_bfloat16, int num_threads, Parallel parallel
) {
    const int64_t numbers = num_tokens * in_features;
    float *wide = is_bfloat16 ? malloc((size_t)(numbers + 1) * sizeof(float)) : 0;
    if (is_bfloat16) {
        if (!wide) return 1;
        for (int64_t i = 0; i < numbers; i++) wide[i] = from_bfloat16(((const uint16_t *)x)[i]);
    }
    int64_t rows = 0;
    for (int64_t m = 0; m < num_matrices; m++) rows += matrices[m].out_features;
    Product job = {matrices, is_bfloat16 ? wide : x, num_tokens, in_features, is_bfloat16};
    share(multiply_rows, &job, rows, num_threads, parallel);
    free(wide);
    return 0;
}

/* ---- low-rank additions ---- */

#define MAX_RANK 1024 /* of all matrices together */
#define COLUMNS 4     /* vectors of outputs at a time: with what is added to them in the registers */

typedef struct {
    const char *b; /* (rank, out_features) */
    int64_t rank, place;
    float scale;
} Addition;

typedef struct {
    const char *a; /* (rank, in_features): those of all additions, one after the other */
    const Addition *additions;
    int64_t rank, num_additions;
} LowRank;

typedef struct {
    const LowRank *const *updates; /* of each row; NULL: none */
    const float *x;
    void *const *outs;
    const int64_t *out_features;
    int64_t in_features;
    int is_bfloat16;
} Adding;

INLINE void add_columns(
    const Addition *one, const float *u, int64_t first, int64_t width, char *y, const int N, const int is_bfloat16
) {
    Floats sums[COLUMNS];
    for (int c = 0; c < N; c++) sums[c] = (Floats){0};
    for (int64_t r = 0; r < one->rank; r++)
        for (int c = 0; c < N; c++)
            sums[c] += load(one->b + r * width * (is_bfloat16 ? 2 : 4), first + c * LANES, is_bfloat16) * u[r];
    for (int c = 0; c < N; c++) {
        float added[LANES];
        store(added, sums[c] * one->scale);
        for (int64_t j = 0, i = first + c * LANES; j < LANES; j++, i++)
            put(y, i, get(y, i, is_bfloat16) + added[j], is_bfloat16);
    }
}

INLINE void add_row(const Adding *job, int64_t row, const int is_bfloat16) {
    const LowRank *update = job->updates[row];
    if (!update) return;
    float projected[MAX_RANK];
    Matrix a = {update->a, projected, update->rank};
    Product product = {&a, job->x + row * job->in_features, 1, job->in_features, is_bfloat16};
    multiply_wide(&product, &a, update->rank, is_bfloat16);
    const float *u = projected;
    for (int64_t k = 0; k < update->num_additions; u += update->additions[k++].rank) {
        const Addition *one = update->additions + k;
        const int64_t width = job->out_features[one->place];
        char *y = (char *)job->outs[one->place] + row * width * (is_bfloat16 ? 2 : 4);
        int64_t i = 0;
        for (; i + COLUMNS * LANES <= width; i += COLUMNS * LANES) add_columns(one, u, i, width, y, COLUMNS, is_bfloat16);
        for (; i + LANES <= width; i += LANES) add_columns(one, u, i, width, y, 1, is_bfloat16);
        for (; i < width; i++) {
            float sum = 0;
            for (int64_t r = 0; r < one->rank; r++) sum += get(one->b, r * width + i, is_bfloat16) * u[r];
            put(y, i, get(y, i, is_bfloat16) + sum * one->scale, is_bfloat16);
        }
    }
}

static void add_rows(const void *argument, int64_t first, int64_t last) {
    const Adding *job = argument;
    for (int64_t row = first; row < last; row++) {
        if (job->is_bfloat16) add_row(job, row, 1);
        else add_row(job, row, 0);
    }
}

/* x: (rows, in_features); outs: of each place (rows, out_features). 0: done, 1: no memory, 2: a rank is too large */
int add_low_rank(
    const LowRank *const *updates, const void *x, int64_t rows, int64_t in_features, void *const *outs,
    const int64_t *out_features, int is_bfloat16, int num_threads, Parallel parallel
) {
    const int64_t numbers = rows * in_features;
    for (int64_t row = 0; row < rows; row++)
        if (updates[row] && updates[row]->rank > MAX_RANK) return 2;
    float *wide = is_bfloat16 ? malloc((size_t)(numbers + 1) * sizeof(float)) : 0;
    if (is_bfloat16) {
        if (!wide) return 1;
        for (int64_t i = 0; i < numbers; i++) wide[i] = from_bfloat16(((const uint16_t *)x)[i]);
    }
    Adding job = {updates, is_bfloat16 ? wide : x, outs, out_features, in_features, is_bfloat16};
    share(add_rows, &job, rows, num_threads, parallel);
    free(wide);
    return 0;
}

/* ---- norms ---- */

INLINE void norm_some(
    const void *x, const void *weight, void *y, int64_t rows, int64_t width, float eps, float offset,
    const int is_bfloat16
) {
    for (int64_t row = 0, at = 0; row < rows; row++, at += width) {
        Floats squares[4] = {{0}};
        const char *from = (const char *)x + at * (is_bfloat16 ? 2 : 4);
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            Floats some = load(from, i, is_bfloat16);
            squares[0] += some * some;
        }
        float totals[4];
        sum_four(squares, totals);
        for (; i < width; i++) totals[0] += get(from, i, is_bfloat16) * get(from, i, is_bfloat16);
        const float scale = 1.0f / sqrtf(totals[0] / (float)width + eps);
        for (i = 0; i < width; i++) {
            float normal = get(from, i, is_bfloat16) * scale, factor = get(weight, i, is_bfloat16);
            /* without an offset the definition rounds before the weight */
            put(y, at + i, offset != 0.0f ? normal * (offset + factor) : rounded(normal, is_bfloat16) * factor,
                is_bfloat16);
        }
    }
}

void norm_rows(
    const void *x, const void *weight, void *y, int64_t rows, int64_t width, float eps, float offset, int is_bfloat16,
    int num_threads, Parallel parallel
) {
    (void)num_threads, (void)parallel;
    if (is_bfloat16) norm_some(x, weight, y, rows, width, eps, offset, 1);
    else norm_some(x, weight, y, rows, width, eps, offset, 0);
}

/* ---- rotations ---- */

INLINE void rotate_some(
    const void *x, const void *cosines, const void *sines, void *y, int64_t tokens, int64_t heads, int64_t width,
    const int is_bfloat16
) {
    const int64_t half = width / 2;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t at = (t * heads + h) * width, turn = t * width;
            for (int64_t i = 0; i < half; i++) {
                float first = get(x, at + i, is_bfloat16), second = get(x, at + half + i, is_bfloat16);
                float left = rounded(first * get(cosines, turn + i, is_bfloat16), is_bfloat16);
                float right = rounded(second * get(cosines, turn + half + i, is_bfloat16), is_bfloat16);
                put(y, at + i, left - second * get(sines, turn + i, is_bfloat16), is_bfloat16);
                put(y, at + half + i, right + first * get(sines, turn + half + i, is_bfloat16), is_bfloat16);
            }
        }
}

/* x, y: (tokens, heads, width); cosines, sines: (tokens, width) */
void rotate_rows(
    const void *x, const void *cosines, const void *sines, void *y, int64_t tokens, int64_t heads, int64_t width,
    int is_bfloat16, int num_threads, Parallel parallel
) {
    (void)num_threads, (void)parallel;
    if (is_bfloat16) rotate_some(x, cosines, sines, y, tokens, heads, width, 1);
    else rotate_some(x, cosines, sines, y, tokens, heads, width, 0);
}

/* ---- gated activations ---- */

INLINE Floats sigmoid(Floats z) {
    Ints negative = z < 0.0f;
    Floats size = (Floats)((Ints)z & 0x7fffffff), p = power(size * -1.44269504088896341f);
    Floats over = 1.0f / (1.0f + p), below = p * over;
    return (Floats)(((Ints)below & negative) | ((Ints)over & ~negative));
}

INLINE void gate_some(
    const void *gate, const void *up, void *y, int64_t count, const int is_gelu, const int is_bfloat16
) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = count - i < LANES ? count - i : LANES;
        float gates[LANES] = {0}, acts[LANES];
        for (int64_t j = 0; j < some; j++) gates[j] = get(gate, i + j, is_bfloat16);
        Floats g = load(gates, 0, 0), z = g;
        if (is_gelu) z = 1.5957691216057308f * (g + 0.044715f * g * g * g); /* 2 sqrt(2 / pi) */
        store(acts, g * sigmoid(z));
        for (int64_t j = 0; j < some; j++)
            put(y, i + j, rounded(acts[j], is_bfloat16) * get(up, i + j, is_bfloat16), is_bfloat16);
    }
}

void gate_rows(
    const void *gate, const void *up, void *y, int64_t count, int is_gelu, int is_bfloat16, int num_threads,
    Parallel parallel
) {
    (void)num_threads, (void)parallel;
    if (is_gelu && is_bfloat16) gate_some(gate, up, y, count, 1, 1);
    else if (is_gelu) gate_some(gate, up, y, count, 1, 0);
    else if (is_bfloat16) gate_some(gate, up, y, count, 0, 1);
    else gate_some(gate, up, y, count, 0, 0);
}
