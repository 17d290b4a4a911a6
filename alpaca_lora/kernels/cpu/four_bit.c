/* Weights in four bits: decoded, multiplied with a few tokens, made.

       w[i] = (table[code[i]] - zero[b]) * scale[b],  b = i / block

   i runs over the matrix (out, in) row by row; two codes lie in a byte, the high half first. A scale is given as it is,
   or in eight bits: scale[b] = map[code[b]] * scales[b >> nested_shift] + offset. All of it in float, products and sums
   rounded one by one (-ffp-contract=off), so that plain torch computes the same bits; only `multiply_four_bit` adds up
   in an order of its own. Each block has its own table of sixteen values: a weight costs a look-up and nothing else. */

#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "threads.h"

#define TOKENS 4 /* multiplied at once: what is more leaves the registers */
#define ROWS 4   /* the same; each token's inputs are loaded once for all of them */
#define MAX_BLOCK 4096

typedef struct {
    const uint8_t *codes;       /* two to a byte */
    const float *table;         /* 16 */
    const float *scales;        /* of each block, or of each nested block */
    const uint8_t *scale_codes; /* of each block; NULL: scales are given as they are */
    const float *scale_map;     /* 256 */
    const float *zeros;         /* of each block; NULL: none */
    float offset;
    int32_t nested_shift;
    int64_t in_features, block;
} Weight;

/* ---- one block ---- */

static inline float scale_of(const Weight *w, int64_t block) {
    if (!w->scale_codes) return w->scales[block];
    float product = w->scale_map[w->scale_codes[block]] * w->scales[block >> w->nested_shift];
    return product + w->offset;
}

static inline void block_values(const Weight *w, int64_t block, float *values) {
    float scale = scale_of(w, block), zero = w->zeros ? w->zeros[block] : 0.0f;
    for (int k = 0; k < 16; k++) values[k] = (w->table[k] - zero) * scale;
}

#ifdef __AVX512F__
static inline __m512 block_table(const Weight *w, int64_t block) { /* the same in one register */
    __m512 zero = _mm512_set1_ps(w->zeros ? w->zeros[block] : 0.0f), scale = _mm512_set1_ps(scale_of(w, block));
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w->table), zero), scale);
}
#endif

static inline int code_at(const uint8_t *codes, int64_t element) {
    uint8_t both = codes[element >> 1];
    return element & 1 ? both & 15 : both >> 4;
}

/* ---- decode: elements [start, start + count) of the flat matrix, all of one block ---- */

static inline void decode_narrow(const Weight *w, int64_t block, int64_t start, int64_t count, uint16_t *out) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    if (!(start & 1) && count >= 32) {
        __m512i bits = _mm512_castps_si512(block_table(w, block));
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        /* twice the table: a look-up of 16-bit numbers reads five bits, the fifth belongs to the neighbour */
        const __m512i table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
        for (; i + 32 <= count; i += 32) {
            __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->codes + ((start + i) >> 1))));
            __m512i places = _mm512_or_si512(_mm512_srli_epi32(both, 4), _mm512_slli_epi32(both, 16));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(places, table));
        }
        if (i == count) return;
    }
#endif
    float values[16];
    uint16_t narrow[16];
    block_values(w, block, values);
    for (int k = 0; k < 16; k++) narrow[k] = to_bfloat16(values[k]);
#if defined(__SSSE3__) && !defined(__AVX512BW__)
    if (!(start & 1)) {
        const __m128i first = _mm_loadu_si128((const __m128i *)narrow), byte = _mm_set1_epi16(255);
        const __m128i second = _mm_loadu_si128((const __m128i *)(narrow + 8)), half = _mm_set1_epi8(15);
        const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
        const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        for (; i + 16 <= count; i += 16) {
            __m128i both = _mm_loadl_epi64((const __m128i *)(w->codes + ((start + i) >> 1)));
            __m128i places = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), half), _mm_and_si128(both, half));
            __m128i lows = _mm_shuffle_epi8(low, places), highs = _mm_shuffle_epi8(high, places);
            _mm_storeu_si128((__m128i *)(out + i), _mm_unpacklo_epi8(lows, highs));
            _mm_storeu_si128((__m128i *)(out + i + 8), _mm_unpackhi_epi8(lows, highs));
        }
    }
#endif
    for (; i < count; i++) out[i] = narrow[code_at(w->codes, start + i)];
}

static inline void decode_wide(const Weight *w, int64_t block, int64_t start, int64_t count, float *out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    if (!(start & 1) && count >= 32) {
        const __m512 table = block_table(w, block);
        const __m512i front = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
        for (; i + 32 <= count; i += 32) {
            __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->codes + ((start + i) >> 1))));
            __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
            __m512 odd = _mm512_permutexvar_ps(both, table);
            _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(even, front, odd));
            _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(even, back, odd));
        }
        if (i == count) return;
    }
#endif
    float values[16];
    block_values(w, block, values);
    for (; i < count; i++) out[i] = values[code_at(w->codes, start + i)];
}

typedef struct {
    const Weight *weight;
    int64_t row, column, columns; /* first of the tile; how wide it is */
    void *out;
    int is_bfloat16;
} Decoding;

static void decode_rows(const void *argument, int64_t first, int64_t last) {
    const Decoding *job = argument;
    const Weight *w = job->weight;
    for (int64_t row = first; row < last; row++) {
        int64_t start = (job->row + row) * w->in_features + job->column, end = start + job->columns;
        int64_t to = row * job->columns, block = start / w->block;
        for (; start < end; block++) {
            int64_t next = (block + 1) * w->block, count = (next < end ? next : end) - start;
            if (job->is_bfloat16) decode_narrow(w, block, start, count, (uint16_t *)job->out + to);
            else decode_wide(w, block, start, count, (float *)job->out + to);
            start += count;
            to += count;
        }
    }
}

/* out: (rows, columns), row-major, of the matrix's part that begins at (row, column) */
void decode_four_bit(
    const Weight *weight, int64_t row, int64_t rows, int64_t column, int64_t columns, void *out, int is_bfloat16,
    int num_threads, Parallel parallel
) {
    Decoding job = {weight, row, column, columns, out, is_bfloat16};
    share(decode_rows, &job, rows, num_threads, parallel);
}

/* ---- multiply: a few tokens with the whole matrix, whose weights never leave the registers ---- */

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 Floats;
typedef __m512 Table;
typedef __m512i Places;
#define ZERO _mm512_setzero_ps()
#define LOAD(at) _mm512_loadu_ps(at)
#define TABLE(w, block) block_table(w, block)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define BYTES(at) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at)))
#define HIGH(bytes) _mm512_srli_epi32(bytes, 4)
#define LOOK_UP(places, table) _mm512_permutexvar_ps(places, table) /* reads the lowest four bits */
#define SUM(a) _mm512_reduce_add_ps(a)
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
typedef __m256 Floats;
typedef struct {
    __m256 low, high;
} Table;
typedef __m256i Places;
#define ZERO _mm256_setzero_ps()
#define LOAD(at) _mm256_loadu_ps(at)
static inline Table TABLE(const Weight *w, int64_t block) {
    float values[16];
    block_values(w, block, values);
    return (Table){_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define BYTES(at) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at)))
#define HIGH(bytes) _mm256_srli_epi32(bytes, 4)
static inline __m256 LOOK_UP(__m256i places, Table table) { /* each half reads three bits; the fourth chooses */
    __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(table.low, places), _mm256_permutevar8x32_ps(table.high, places), chosen
    );
}
static inline float SUM(__m256 a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

#ifdef LANES
typedef struct {
    const Weight *weight;
    const float *x; /* of each token: inputs of even and of odd places apart, LANES of each in turn */
    void *out;      /* (tokens, out_features) */
    int64_t num_tokens, out_features;
    int is_bfloat16;
} Product;

/* rows [row, row + R) with T tokens; D: sums of even and odd places apart, where there are few others to overlap */
static inline __attribute__((always_inline)) void multiply_some(
    const Product *job, int64_t row, const int R, const int T, const int D
) {
    const Weight *w = job->weight;
    int64_t blocks = w->in_features / w->block, row_bytes = w->in_features / 2;
    Floats sums[ROWS][TOKENS][2];
    Table tables[ROWS];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int d = 0; d < D; d++) sums[r][t][d] = ZERO;
    for (int64_t b = 0; b < blocks; b++) {
        for (int r = 0; r < R; r++) {
            tables[r] = TABLE(w, (row + r) * blocks + b);
            /* the next rows: a row is too short for the processor to see where it leads */
            __builtin_prefetch(w->codes + (row + R + r) * row_bytes + b * w->block / 2);
        }
        for (int64_t i = b * w->block; i < (b + 1) * w->block; i += 2 * LANES) {
            Floats even[ROWS], odd[ROWS];
            for (int r = 0; r < R; r++) {
                Places bytes = BYTES(w->codes + (row + r) * row_bytes + i / 2);
                even[r] = LOOK_UP(HIGH(bytes), tables[r]);
                odd[r] = LOOK_UP(bytes, tables[r]);
            }
            for (int t = 0; t < T; t++) {
                const float *x = job->x + t * w->in_features + i;
                Floats x_even = LOAD(x), x_odd = LOAD(x + LANES);
                for (int r = 0; r < R; r++) {
                    sums[r][t][0] = FMA(even[r], x_even, sums[r][t][0]);
                    sums[r][t][D - 1] = FMA(odd[r], x_odd, sums[r][t][D - 1]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float sum = SUM(sums[r][t][0]);
            if (D == 2) sum += SUM(sums[r][t][1]);
            int64_t to = t * job->out_features + row + r;
            if (job->is_bfloat16) ((uint16_t *)job->out)[to] = to_bfloat16(sum);
            else ((float *)job->out)[to] = sum;
        }
}

#define MULTIPLY(T, D)                                                                  \
    for (; row + ROWS <= last; row += ROWS) multiply_some(job, row, ROWS, T, D);        \
    for (; row < last; row++) multiply_some(job, row, 1, T, D);                         \
    break;

static void multiply_rows(const void *argument, int64_t first, int64_t last) {
    const Product *job = argument;
    int64_t row = first;
    switch (job->num_tokens) {
    case 1: MULTIPLY(1, 2)
    case 2: MULTIPLY(2, 1)
    case 3: MULTIPLY(3, 1)
    default: MULTIPLY(4, 1)
    }
}
#endif

/* out (tokens, out_features) = x (tokens, in_features) W^T; 0: done, 1: no memory or not for these sizes */
int multiply_four_bit(
    const Weight *weight, const void *x, int64_t num_tokens, int64_t out_features, void *out, int is_bfloat16,
    int num_threads, Parallel parallel
) {
#ifdef LANES
    int64_t in_features = weight->in_features;
    if (num_tokens < 1 || num_tokens > TOKENS) return 1;
    if (weight->block % (2 * LANES) || in_features % weight->block) return 1;
    float *apart = malloc((size_t)(num_tokens * in_features) * sizeof(float));
    if (!apart) return 1;
    for (int64_t start = 0; start < num_tokens * in_features; start += 2 * LANES)
        for (int64_t k = 0; k < 2 * LANES; k++) {
            int64_t i = start + k;
            float value = is_bfloat16 ? from_bfloat16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
            apart[start + (k & 1) * LANES + k / 2] = value;
        }
    Product job = {weight, apart, out, num_tokens, out_features, is_bfloat16};
    share(multiply_rows, &job, out_features, num_threads, parallel);
    free(apart);
    return 0;
#else
    (void)weight, (void)x, (void)num_tokens, (void)out_features, (void)out, (void)is_bfloat16, (void)num_threads;
    (void)parallel;
    return 1;
#endif
}

/* ---- encode: whole blocks; a code is how many of the 15 bounds lie below the number, in the table's own order ---- */

typedef struct {
    const void *values;
    int is_bfloat16;
    int64_t block;
    const float *bounds;
    const uint8_t *order;
    float smallest, largest_inverse;
    uint8_t *codes;
    float *largest;
} Encoding;

static void encode_blocks(const void *argument, int64_t first, int64_t last) {
    const Encoding *job = argument;
    const int64_t size = job->block;
    float bounds[15], values[MAX_BLOCK];
    uint8_t ranks[MAX_BLOCK];
    memcpy(bounds, job->bounds, sizeof bounds);
    for (int64_t block = first; block < last; block++) {
        if (job->is_bfloat16) {
            const uint16_t *from = (const uint16_t *)job->values + block * size;
            for (int64_t i = 0; i < size; i++) values[i] = from_bfloat16(from[i]);
        } else memcpy(values, (const float *)job->values + block * size, (size_t)size * sizeof(float));
        uint32_t most = 0; /* magnitudes are ordered as their bits are; what is no number is above all */
        for (int64_t i = 0; i < size; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float largest, inverse;
        memcpy(&largest, &most, 4);
        job->largest[block] = largest;
        inverse = 1.0f / (largest > job->smallest ? largest : job->smallest);
        if (inverse > job->largest_inverse) inverse = job->largest_inverse;
        for (int64_t i = 0; i < size; i++) {
            float scaled = values[i] * inverse;
            int32_t rank = 0;
#pragma GCC unroll 15
            for (int k = 0; k < 15; k++) rank += scaled > bounds[k];
            ranks[i] = (uint8_t)rank;
        }
        uint8_t *to = job->codes + block * size / 2;
        for (int64_t i = 0; i < size; i += 2)
            to[i / 2] = (uint8_t)(job->order[ranks[i]] << 4 | job->order[ranks[i + 1]]);
    }
}

/* block <= 4096, even; codes: two to a byte; largest: magnitude of each block */
void encode_four_bit(
    const void *values, int is_bfloat16, int64_t num_blocks, int64_t block, const float *bounds, const uint8_t *order,
    float smallest, float largest_inverse, uint8_t *codes, float *largest, int num_threads, Parallel parallel
) {
    Encoding job = {values, is_bfloat16, block, bounds, order, smallest, largest_inverse, codes, largest};
    share(encode_blocks, &job, num_blocks, num_threads, parallel);
}
