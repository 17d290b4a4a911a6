/* Weights in four bits, decoded: w = (table[code] - zero[block]) * scale[block], in float, rounded to nearest even for
   bfloat16. The flat matrix (row-major) is cut into blocks; two codes lie in a byte, the high half first.

   A scale is given as it is, or quantized itself: scale[b] = map[code[b]] * absmax[b / nested_block] + offset.
   Products and sums are rounded one by one (compile with -ffp-contract=off), so that torch computes the same bits. */

#include <pthread.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define MAX_THREADS 64
#define ELEMENTS_PER_THREAD 65536 /* below it a thread costs more than it saves */

typedef struct {
    const uint8_t *codes;        /* two to a byte */
    const float *table;          /* 16 */
    const float *scales;         /* of each block, or of each nested block */
    const uint8_t *scale_codes;  /* NULL: scales are given as they are */
    const float *scale_map;      /* 256 */
    float offset;
    int64_t nested_block;
    const float *zeros;          /* of each block; NULL: none */
    int64_t in_features, block;
    int64_t row, rows, column, columns; /* first and number, of the tile */
    void *out;                   /* (rows, columns), row-major */
    int is_bfloat16;
} Job;

typedef struct {
    const Job *job;
    int64_t first, last; /* rows of the tile */
} Share;

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static float scale_of(const Job *job, int64_t block) {
    if (!job->scale_codes) return job->scales[block];
    float product = job->scale_map[job->scale_codes[block]] * job->scales[block / job->nested_block];
    return product + job->offset;
}

static int code_at(const uint8_t *codes, int64_t element) {
    uint8_t both = codes[element >> 1];
    return element & 1 ? both & 15 : both >> 4;
}

/* elements [start, start + count) of the flat matrix, all of one block, to place `to` of the output */
static void decode_run(const Job *job, int64_t start, int64_t count, int64_t to) {
    int64_t block = start / job->block, i = 0;
    float scale = scale_of(job, block), zero = job->zeros ? job->zeros[block] : 0.0f;
    float *wide = (float *)job->out + to;
    uint16_t *narrow = (uint16_t *)job->out + to;
#ifdef __AVX512F__
    if (!(start & 1)) {
        const __m512 table = _mm512_loadu_ps(job->table), scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
        const __m128i low = _mm_set1_epi16(15);
        const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
        for (; i + 16 <= count; i += 16) {
            __m128i both = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(job->codes + ((start + i) >> 1))));
            __m128i ordered = _mm_or_si128(_mm_srli_epi16(both, 4), _mm_slli_epi16(_mm_and_si128(both, low), 8));
            __m512 value = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(ordered), table);
            value = _mm512_mul_ps(_mm512_sub_ps(value, zeros), scales);
            if (job->is_bfloat16) {
                __m512i bits = _mm512_castps_si512(value);
                __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
                bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(half, odd)), 16);
                _mm256_storeu_si256((__m256i *)(narrow + i), _mm512_cvtepi32_epi16(bits));
            } else {
                _mm512_storeu_ps(wide + i, value);
            }
        }
    }
#endif
    for (; i < count; i++) {
        float value = (job->table[code_at(job->codes, start + i)] - zero) * scale;
        if (job->is_bfloat16) narrow[i] = to_bfloat16(value);
        else wide[i] = value;
    }
}

static void *decode_rows(void *argument) {
    const Share *share = argument;
    const Job *job = share->job;
    for (int64_t row = share->first; row < share->last; row++) {
        int64_t start = (job->row + row) * job->in_features + job->column, end = start + job->columns;
        int64_t to = row * job->columns;
        while (start < end) {
            int64_t next = (start / job->block + 1) * job->block;
            int64_t count = (next < end ? next : end) - start;
            decode_run(job, start, count, to);
            start += count;
            to += count;
        }
    }
    return 0;
}

void decode_four_bit(
    const uint8_t *codes, const float *table, const float *scales, const uint8_t *scale_codes, const float *scale_map,
    float offset, int64_t nested_block, const float *zeros, int64_t in_features, int64_t block, int64_t row,
    int64_t rows, int64_t column, int64_t columns, void *out, int is_bfloat16, int num_threads
) {
    Job job = {codes, table, scales, scale_codes, scale_map, offset, nested_block, zeros, in_features, block, row, rows,
               column, columns, out, is_bfloat16};
    Share shares[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    int is_started[MAX_THREADS] = {0};
    int64_t count = rows * columns / ELEMENTS_PER_THREAD + 1;
    if (count > num_threads) count = num_threads;
    if (count > MAX_THREADS) count = MAX_THREADS;
    if (count < 1) count = 1;
    for (int64_t i = 0; i < count; i++) {
        shares[i] = (Share){&job, rows * i / count, rows * (i + 1) / count};
        if (i) is_started[i] = !pthread_create(&threads[i], 0, decode_rows, &shares[i]);
        if (i && !is_started[i]) decode_rows(&shares[i]);
    }
    decode_rows(&shares[0]);
    for (int64_t i = 1; i < count; i++)
        if (is_started[i]) pthread_join(threads[i], 0);
}
