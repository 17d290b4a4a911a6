/* Attention of one new token of each sequence over keys and values that are kept in blocks of a pool.

       out = sum_t p_t v_t / sum_t p_t,  p_t = exp(scale q k_t - peak)

   Place t of a sequence is row table[t / block] * block + t % block of the pool (rows, K, width). Its places are cut
   into parts of PART; each is one piece of work: a tile of places after the other, in it a key head after the other,
   for all query heads that share it, so that memory is read once and in its order. A part keeps its peak, its sum and
   its sum of values, which are rescaled when a higher peak comes; parts are joined in their order. So results depend
   neither on the number of threads nor on who else is in the call. In float inside; exponents are of base 2. Only
   places that the token sees are read. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"
#include "threads.h"
#include "vectors.h"

#define HEADS (LANES == 16 ? 4 : 2) /* of a key head, added up at once: what is more leaves the registers */
#define COLUMNS 4                   /* vectors of a row; the same */
#define PART 256 /* places */
#define TILE 32  /* places between two looks at the peak; a multiple of LANES */
#define MAX_WIDTH 256

enum { DONE, NO_MEMORY, WRONG_LENGTH, WRONG_BLOCK };

typedef struct {
    int64_t num_sequences, heads, kv_heads, width; /* width <= MAX_WIDTH */
    int64_t num_blocks, block, table_width;        /* block a power of two */
    int64_t window;                                /* 0: all places */
    float scale;
    int32_t is_bfloat16;
} Sizes;

typedef struct {
    int64_t sequence, first, last; /* places */
} Part;

typedef struct {
    const char *keys, *values; /* (rows, kv_heads, width) */
    const int32_t *tables;     /* (sequences, table_width) */
    void *out;                 /* (sequences, heads, width) */
    const float *q;            /* (sequences, heads, padded), times scale and log2(e) */
    const Part *parts;
    const int64_t *first_part; /* of each sequence; one more */
    float *sums;               /* (parts, heads, padded + LANES): of values, of probabilities */
    float *peaks;              /* (parts, heads) */
    int64_t heads, kv_heads, width, padded, block, shift, table_width;
    int is_bfloat16;
} Job;

static inline float highest(float peak) { return peak == -INFINITY ? 0.0f : peak; } /* inf - inf is no number */

/* Rows that are wanted next: one is too short, and blocks lie too far apart, for the processor to see where it leads.
   8 sequences of 1,024 took 1.75 ms without, 0.92 with rows fetched into the first cache, 0.6 into the second. */
typedef struct {
    const char *const *rows;
    int64_t count, bytes;
} Coming;

INLINE void fetch(const Coming *coming, int64_t t) {
    if (t >= coming->count) return;
    for (int64_t i = 0; i < coming->bytes; i += 64) __builtin_prefetch(coming->rows[t] + i, 0, 2);
}

/* ---- a tile: R query heads of one key head, a few places ---- */

typedef struct {
    const char *keys[TILE], *values[TILE]; /* rows; behind `count`, up to a multiple of four, the last again */
    int64_t count;
} Tile;

INLINE void score_tile(
    const float *q, const Tile *tile, const Coming *coming, int64_t padded, float (*scores)[TILE], const int R,
    const int is_bfloat16
) {
    for (int64_t t = 0; t < tile->count; t += 4) {
        for (int j = 0; j < 4; j++) fetch(coming, t + j);
        Floats sums[HEADS][4];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 4; j++) sums[r][j] = (Floats){0};
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats k[4];
            for (int j = 0; j < 4; j++) k[j] = load(tile->keys[t + j], i, is_bfloat16);
            for (int r = 0; r < R; r++) {
                Floats x = load(q + r * padded, i, 0);
                for (int j = 0; j < 4; j++) sums[r][j] += x * k[j];
            }
        }
        for (int r = 0; r < R; r++) sum_four(sums[r], scores[r] + t);
    }
}

/* scores -> probabilities, relative to the peak so far; what the sums of the earlier tiles are to be multiplied by */
INLINE float weigh(float *scores, int64_t count, float *peak, float *sum) {
    for (int64_t t = count; t % LANES; t++) scores[t] = -INFINITY;
    Floats top = load(scores, 0, 0);
    for (int64_t t = LANES; t < count; t += LANES) top = larger(load(scores, t, 0), top);
    float now = *peak;
    for (int l = 0; l < LANES; l++) now = top[l] > now ? top[l] : now;
    float factor = power_of(*peak - highest(now));
    Floats total = load(sum, 0, 0) * factor;
    for (int64_t t = 0; t < count; t += LANES) {
        Floats p = power(load(scores, t, 0) - highest(now));
        store(scores + t, p);
        total += p;
    }
    store(sum, total);
    *peak = now;
    return factor;
}

/* columns [column, column + C * LANES) of the sums of values */
INLINE void add_values(
    float *sums, int64_t column, const Tile *tile, const Coming *coming, int64_t padded, float (*p)[TILE],
    const float *factors, const int R, const int C, const int is_bfloat16
) {
    const int64_t stride = padded + LANES;
    Floats some[HEADS][COLUMNS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) some[r][c] = load(sums + r * stride, column + c * LANES, 0) * factors[r];
    for (int64_t t = 0; t < tile->count; t++) {
        fetch(coming, t);
        Floats v[COLUMNS];
        for (int c = 0; c < C; c++) v[c] = load(tile->values[t], column + c * LANES, is_bfloat16);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) some[r][c] += p[r][t] * v[c];
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(sums + r * stride + column + c * LANES, some[r][c]);
}

INLINE void attend_tile(
    const Job *job, const Tile *tile, const Tile *next, const float *q, float *sums, float *peaks, const int R,
    const int is_bfloat16
) {
    const int64_t bytes = job->width * (job->is_bfloat16 ? 2 : 4);
    const Coming coming_values = {tile->values, tile->count, bytes}, coming_keys = {next->keys, next->count, bytes};
    const int64_t padded = job->padded, stride = padded + LANES;
    float scores[HEADS][TILE], factors[HEADS];
    score_tile(q, tile, &coming_values, padded, scores, R, is_bfloat16);
    for (int r = 0; r < R; r++)
        factors[r] = weigh(scores[r], tile->count, peaks + r, sums + r * stride + padded);
    for (int64_t i = 0, step; i < padded; i += step) {
        const int is_wide = i + COLUMNS * LANES <= padded;
        const Coming coming = i ? (Coming){0} : coming_keys;
        step = (is_wide ? COLUMNS : 1) * LANES;
        if (is_wide) add_values(sums, i, tile, &coming, padded, scores, factors, R, COLUMNS, is_bfloat16);
        else add_values(sums, i, tile, &coming, padded, scores, factors, R, 1, is_bfloat16);
    }
}

/* ---- a part ---- */

static void find_rows(const Job *job, const Part *part, int64_t start, int64_t kv_head, Tile *tile) {
    const int32_t *table = job->tables + part->sequence * job->table_width;
    const int64_t row_bytes = job->width * (job->is_bfloat16 ? 2 : 4);
    const int64_t left = part->last - start;
    tile->count = left < 0 ? 0 : left < TILE ? left : TILE;
    for (int64_t t = 0; t < tile->count; t++) {
        int64_t place = start + t;
        int64_t row = ((int64_t)table[place >> job->shift] << job->shift) + (place & (job->block - 1));
        int64_t offset = (row * job->kv_heads + kv_head) * row_bytes;
        tile->keys[t] = job->keys + offset;
        tile->values[t] = job->values + offset;
    }
    for (int64_t t = tile->count; t % 4; t++) {
        tile->keys[t] = tile->keys[t - 1];
        tile->values[t] = tile->values[t - 1];
    }
}

/* the tile's rows as floats with zeros behind them, for a width that is no multiple of LANES */
static void widen_rows(const Job *job, const char **rows, int64_t count, float *wide) {
    for (int64_t t = 0; t < count; t++) {
        float *to = wide + t * job->padded;
        for (int64_t i = 0; i < job->width; i++)
            to[i] = job->is_bfloat16 ? from_bfloat16(((const uint16_t *)rows[t])[i]) : ((const float *)rows[t])[i];
        for (int64_t i = job->width; i < job->padded; i++) to[i] = 0.0f;
        rows[t] = (const char *)to;
    }
}

#define ATTEND(R)                                                                            \
    if (is_bfloat16) attend_tile(job, &tile, &next, q, sums, peaks, R, 1);                          \
    else attend_tile(job, &tile, &next, q, sums, peaks, R, 0);                                      \
    break;

static void attend_part(const Job *job, int64_t index) {
    const Part *part = job->parts + index;
    const int64_t padded = job->padded, stride = padded + LANES, group = job->heads / job->kv_heads;
    const int is_padded = padded != job->width, is_bfloat16 = job->is_bfloat16 && !is_padded;
    float wide_keys[TILE * MAX_WIDTH], wide_values[TILE * MAX_WIDTH];
    memset(job->sums + index * job->heads * stride, 0, (size_t)(job->heads * stride) * sizeof(float));
    for (int64_t head = 0; head < job->heads; head++) job->peaks[index * job->heads + head] = -INFINITY;
    Tile tile, next;
    find_rows(job, part, part->first, 0, &next);
    for (int64_t start = part->first; start < part->last; start += TILE)
        for (int64_t kv_head = 0; kv_head < job->kv_heads; kv_head++) {
            tile = next;
            if (kv_head + 1 < job->kv_heads) find_rows(job, part, start, kv_head + 1, &next);
            else find_rows(job, part, start + TILE, 0, &next);
            if (is_padded) {
                int64_t rounded = (tile.count + 3) / 4 * 4;
                widen_rows(job, tile.keys, rounded, wide_keys);
                widen_rows(job, tile.values, rounded, wide_values);
            }
            for (int64_t g = 0; g < group; g += HEADS) {
                int64_t head = kv_head * group + g;
                const float *q = job->q + (part->sequence * job->heads + head) * padded;
                float *sums = job->sums + (index * job->heads + head) * stride;
                float *peaks = job->peaks + index * job->heads + head;
                switch (group - g) {
                case 1: ATTEND(1)
#if HEADS > 2
                case 2: ATTEND(2)
                case 3: ATTEND(3)
#endif
                default: ATTEND(HEADS)
                }
            }
        }
}

/* the joint result of a sequence's parts */
static void join_parts(const Job *job, int64_t sequence) {
    const int64_t padded = job->padded, stride = padded + LANES;
    const int64_t first = job->first_part[sequence], last = job->first_part[sequence + 1];
    for (int64_t head = 0; head < job->heads; head++) {
        float joint[MAX_WIDTH + LANES] = {0}, peak = -INFINITY, total = 0.0f;
        for (int64_t part = first; part < last; part++) {
            float one = job->peaks[part * job->heads + head];
            peak = one > peak ? one : peak;
        }
        for (int64_t part = first; part < last; part++) {
            const float *sums = job->sums + (part * job->heads + head) * stride;
            float factor = power_of(job->peaks[part * job->heads + head] - highest(peak));
            for (int64_t i = 0; i < stride; i++) joint[i] += factor * sums[i];
        }
        for (int64_t l = 0; l < LANES; l++) total += joint[padded + l];
        int64_t to = (sequence * job->heads + head) * job->width;
        for (int64_t i = 0; i < job->width; i++) {
            if (job->is_bfloat16) ((uint16_t *)job->out)[to + i] = to_bfloat16(joint[i] / total);
            else ((float *)job->out)[to + i] = joint[i] / total;
        }
    }
}

static void attend_parts(const void *argument, int64_t first, int64_t last) {
    const Job *job = argument;
    for (int64_t part = first; part < last; part++) {
        int64_t sequence = job->parts[part].sequence;
        attend_part(job, part);
        if (job->first_part[sequence + 1] - job->first_part[sequence] == 1) join_parts(job, sequence);
    }
}

/* ---- the calls ---- */

/* the first place that the token sees, of `length` places */
static inline int64_t first_seen(int64_t length, int64_t window) {
    return window > 0 && window < length ? length - window : 0;
}

/* how many parts there are; negative: which of the problems above, found before anything is read */
static int64_t count_parts(const Sizes *sizes, const int32_t *tables, const int32_t *lengths) {
    int64_t count = 0;
    for (int64_t b = 0; b < sizes->num_sequences; b++) {
        int64_t length = lengths[b], first = first_seen(length, sizes->window);
        if (length < 1 || length > sizes->table_width * sizes->block) return -WRONG_LENGTH;
        for (int64_t i = first / sizes->block; i * sizes->block < length; i++) {
            int64_t entry = tables[b * sizes->table_width + i];
            if (entry < 0 || entry >= sizes->num_blocks) return -WRONG_BLOCK;
        }
        count += (length - first + PART - 1) / PART;
    }
    return count;
}

static void cut(const Sizes *sizes, const int32_t *lengths, Part *parts, int64_t *first_part) {
    int64_t count = 0;
    for (int64_t b = 0; b < sizes->num_sequences; b++) {
        first_part[b] = count;
        for (int64_t start = first_seen(lengths[b], sizes->window); start < lengths[b]; start += PART)
            parts[count++] = (Part){b, start, start + PART < lengths[b] ? start + PART : lengths[b]};
    }
    first_part[sizes->num_sequences] = count;
}

static void scale_queries(const Sizes *sizes, const void *q, int64_t padded, float *scaled) {
    for (int64_t row = 0; row < sizes->num_sequences * sizes->heads; row++, scaled += padded)
        for (int64_t i = 0; i < padded; i++) {
            int64_t from = row * sizes->width + i;
            float x = 0.0f;
            if (i < sizes->width && sizes->is_bfloat16) x = from_bfloat16(((const uint16_t *)q)[from]);
            else if (i < sizes->width) x = ((const float *)q)[from];
            scaled[i] = x * (sizes->scale * 1.44269504f); /* log2(e) */
        }
}

int paged_attention(
    const void *q, const void *keys, const void *values, const int32_t *tables, const int32_t *lengths, void *out,
    const Sizes *sizes, int64_t num_threads, Parallel parallel
) {
    const int64_t num_parts = count_parts(sizes, tables, lengths), heads = sizes->heads, kv_heads = sizes->kv_heads;
    if (num_parts < 0) return (int)-num_parts;
    const int64_t padded = (sizes->width + LANES - 1) / LANES * LANES, num_rows = sizes->num_sequences * heads;
    const size_t num_floats = (size_t)(num_rows * padded + num_parts * heads * (padded + LANES) + num_parts * heads);
    const size_t num_numbers = (size_t)(num_parts * 3 + sizes->num_sequences + 1);
    char *memory = malloc(num_floats * sizeof(float) + num_numbers * sizeof(int64_t) + 72);
    if (!memory) return NO_MEMORY;
    float *scaled = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63), *sums = scaled + num_rows * padded;
    Part *parts = (Part *)(((uintptr_t)(scaled + num_floats) + 7) & ~(uintptr_t)7);
    int64_t *first_part = (int64_t *)(parts + num_parts), shift = 0;
    while (((int64_t)1 << shift) < sizes->block) shift++;
    scale_queries(sizes, q, padded, scaled);
    cut(sizes, lengths, parts, first_part);
    Job job = {
        keys, values, tables, out, scaled, parts, first_part, sums, sums + num_parts * heads * (padded + LANES),
        heads, kv_heads, sizes->width, padded, sizes->block, shift, sizes->table_width, sizes->is_bfloat16
    };
    share(attend_parts, &job, num_parts, num_threads, parallel);
    for (int64_t b = 0; b < sizes->num_sequences; b++)
        if (first_part[b + 1] - first_part[b] > 1) join_parts(&job, b);
    free(memory);
    return DONE;
}

/* rows of k and v (stride_k, stride_v bytes apart) to the rows `places` of the pool; checked before any is written */
int write_paged(
    const char *k, const char *v, char *keys, char *values, const int64_t *places, int64_t num_tokens,
    int64_t row_bytes, int64_t stride_k, int64_t stride_v, int64_t num_rows, int64_t num_threads, Parallel parallel
) {
    (void)num_threads, (void)parallel; /* memory is the limit, not the processor */
    for (int64_t t = 0; t < num_tokens; t++)
        if (places[t] < 0 || places[t] >= num_rows) return WRONG_BLOCK;
    for (int64_t t = 0; t < num_tokens; t++) {
        memcpy(keys + places[t] * row_bytes, k + t * stride_k, (size_t)row_bytes);
        memcpy(values + places[t] * row_bytes, v + t * stride_v, (size_t)row_bytes);
    }
    return DONE;
}
