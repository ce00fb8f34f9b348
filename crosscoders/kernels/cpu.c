/* Sparse products for crosscoders.sparse on a CPU. float32, row-major; indices are int64.

   Functions with a range compute outputs begin to end only, so threads share nothing and the split changes no bit.
   Products read rows in blocks of BLOCK columns, packed first: rows whose distance is a power of two share few cache
   sets, and unpacked the same product takes 2 to 4 times as long. It pays where a row is used several times. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16
#define BLOCK 64
#define SUMMED 1024
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* ------------------------------------------------------------------------------------------------------ selection */

/* Bit i: value[i] > bound[i]. */
static inline uint32_t above(lanes value, lanes bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, (__m512)bound, _CMP_GT_OQ);
#elif defined(__AVX2__)
    const float *v = (const float *)&value, *b = (const float *)&bound;
    __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(v), _mm256_loadu_ps(b), _CMP_GT_OQ);
    __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(v + 8), _mm256_loadu_ps(b + 8), _CMP_GT_OQ);
    return (uint32_t)_mm256_movemask_ps(low) | (uint32_t)_mm256_movemask_ps(high) << 8;
#else
    uint32_t mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (uint32_t)(value[i] > bound[i]) << i;
    return mask;
#endif
}

/* Entries with v = pre[t][j] + bias[j] > gate[j] in ascending order, with scaled = v weight[j]. Returns how many there
   are; the first `room` of them are stored. Rows of pre begin `distance` apart. */
int64_t select_above(const float *pre, int64_t distance, const float *bias, const float *gate, const float *weight,
                     int64_t dict_size, int64_t begin, int64_t end, int64_t room, int64_t *tokens, int64_t *latents,
                     float *values, float *scaled) {
    int64_t n = 0;
    for (int64_t t = begin; t < end; t++) {
        const float *row = pre + t * distance;
        for (int64_t j = 0; j < dict_size; j += LANES) {
            uint32_t mask = 0;
            __builtin_prefetch(row + j + 64 * LANES, 0, 2);
            if (j + LANES <= dict_size)
                mask = above(*(const lanes *)(row + j) + *(const lanes *)(bias + j), *(const lanes *)(gate + j));
            else
                for (int64_t i = j; i < dict_size; i++) mask |= (uint32_t)(row[i] + bias[i] > gate[i]) << (i - j);
            for (; mask; mask &= mask - 1, n++) {
                int64_t i = j + __builtin_ctz(mask);
                if (n >= room) continue;
                float value = row[i] + bias[i];
                tokens[n] = t, latents[n] = i, values[n] = value, scaled[n] = value * weight[i];
            }
        }
    }
    return n;
}

typedef int32_t bits __attribute__((may_alias));

/* A cut with exactly n_kept of n > n_kept positive values above it or among the first *n_ties that equal it. Positive
   floats order as their bits, so the cut is found by bisection of the bits, with one vectorised count for each. */
static float cut_at(const float *values, int64_t n, int64_t n_kept, int64_t *n_ties) {
    const bits *found = (const bits *)values;
    bits low = 0, high = 0x7f800001; /* count(>= low) >= n_kept > count(>= high) */
    for (int64_t n_low = n; high - low > 1 && n_low > n_kept;) {
        bits middle = low + (high - low) / 2;
        int32_t count = 0;
        for (int64_t i = 0; i < n; i++) count += found[i] >= middle;
        if (count >= n_kept)
            low = middle, n_low = count;
        else
            high = middle;
    }
    int64_t n_above = 0;
    for (int64_t i = 0; i < n; i++) n_above += found[i] > low;
    *n_ties = n_kept - n_above;
    float cut;
    memcpy(&cut, &low, sizeof cut);
    return cut;
}

/* Move the n_kept entries of largest `scaled`, of n > n_kept, to the front, in order; ties go to earlier entries. */
void keep_largest(int64_t n, int64_t n_kept, int64_t *tokens, int64_t *latents, float *values, float *scaled,
                  float *cut) {
    int64_t n_ties, place = 0;
    *cut = cut_at(scaled, n, n_kept, &n_ties);
    for (int64_t i = 0; i < n; i++) {
        int tie = scaled[i] == *cut;
        if (scaled[i] > *cut || (tie && n_ties > 0)) {
            tokens[place] = tokens[i], latents[place] = latents[i];
            values[place] = values[i], scaled[place] = scaled[i], place++;
        }
        n_ties -= tie;
    }
}

/* The positive v weight[c] with v = row[columns[c]] + bias[c], their v and c, in order; returns how many. Each output
   has room for n_columns and LANES more. */
static int64_t positives(const float *row, const int32_t *columns, const float *bias, const float *weight,
                         int64_t n_columns, float *scaled, float *values, int32_t *places) {
    int64_t n = 0, c = 0;
#if defined(__AVX512F__)
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; c + LANES <= n_columns; c += LANES) {
        __m512 v = _mm512_i32gather_ps(_mm512_loadu_si512(columns + c), row, 4) + _mm512_loadu_ps(bias + c);
        __m512 found = v * _mm512_loadu_ps(weight + c);
        __mmask16 mask = _mm512_cmp_ps_mask(found, _mm512_setzero_ps(), _CMP_GT_OQ);
        _mm512_storeu_ps(scaled + n, _mm512_maskz_compress_ps(mask, found));
        _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(mask, v));
        _mm512_storeu_si512(places + n, _mm512_maskz_compress_epi32(mask, _mm512_set1_epi32(c) + lane));
        n += __builtin_popcount(mask);
    }
#endif
    for (; c < n_columns; c++) {
        float v = row[columns[c]] + bias[c];
        scaled[n] = v * weight[c], values[n] = v, places[n] = c;
        n += scaled[n] > 0;
    }
    return n;
}

/* The n entries with scaled above cut, and n_ties of those at it, in order; returns how many. Outputs as above. */
static int64_t take(const float *scaled, const float *values, const int32_t *places, int64_t n, float cut,
                    int64_t n_ties, int64_t *taken, float *taken_values) {
    int64_t n_taken = 0, i = 0;
#if defined(__AVX512F__)
    for (; i + LANES <= n; i += LANES) {
        __m512 v = _mm512_loadu_ps(scaled + i);
        uint32_t mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(cut), _CMP_GT_OQ);
        uint32_t ties = _mm512_cmp_ps_mask(v, _mm512_set1_ps(cut), _CMP_EQ_OQ);
        for (; ties && n_ties > 0; ties &= ties - 1, n_ties--) mask |= ties & -ties;
        __m512i found = _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(places + i));
        _mm512_storeu_si512(taken + n_taken, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(found)));
        _mm512_storeu_si512(taken + n_taken + 8, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(found, 1)));
        _mm512_storeu_ps(taken_values + n_taken, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(values + i)));
        n_taken += __builtin_popcount(mask);
    }
#endif
    for (; i < n; i++) {
        int tie = scaled[i] == cut, kept = (scaled[i] > cut) | (tie & (n_ties > 0)); /* no branch to mispredict */
        n_ties -= tie;
        taken[n_taken] = places[i], taken_values[n_taken] = values[i], n_taken += kept;
    }
    return n_taken;
}

/* For each token the k largest positive v weight[c] with v = pre[t][columns[c]] + bias[c], ascending by c, ties to
   lower ones. Returns how many they are in all; tokens, places (c) and values (v) have room for k a token and LANES
   more, scratch for 4 (n_columns + LANES). */
int64_t largest_per_token(const float *pre, const int64_t *columns, const float *bias, const float *weight,
                          int64_t dict_size, int64_t n_columns, int64_t k, int64_t begin, int64_t end, int64_t *tokens,
                          int64_t *places, float *values, float *scratch) {
    int64_t n_all = 0, room = n_columns + LANES;
    float *scaled = scratch, *raw = scratch + room;
    int32_t *found = (int32_t *)(scratch + 2 * room), *narrow = (int32_t *)(scratch + 3 * room);
    for (int64_t c = 0; c < n_columns; c++) narrow[c] = columns[c];
    for (int64_t t = begin; t < end; t++) {
        const float *row = pre + t * dict_size;
        for (int64_t j = 0; j < dict_size; j += LANES) __builtin_prefetch(row + dict_size + j, 0, 2); /* the next one */
        int64_t n = positives(row, narrow, bias, weight, n_columns, scaled, raw, found), n_ties = n;
        float cut = n > k ? cut_at(scaled, n, k, &n_ties) : 0;
        int64_t n_taken = take(scaled, raw, found, n, cut, n_ties, places + n_all, values + n_all);
        for (int64_t i = 0; i < n_taken; i++) tokens[n_all + i] = t;
        n_all += n_taken;
    }
    return n_all;
}

/* From how many entries each key has to the first place of each. */
static void starts_of(int64_t *counts, int64_t n_keys) {
    for (int64_t j = 0, sum = 0; j < n_keys; j++) {
        int64_t count = counts[j];
        counts[j] = sum, sum += count;
    }
}

/* The entries in stable order of their keys; starts: the first place of each key. */
void sort_by_key(const int64_t *keys, const int64_t *ids, const float *values, int64_t n, int64_t n_keys,
                 int64_t *starts, int64_t *sorted_ids, float *sorted_values) {
    memset(starts, 0, n_keys * sizeof *starts);
    for (int64_t i = 0; i < n; i++) starts[keys[i]]++;
    starts_of(starts, n_keys);
    for (int64_t i = 0; i < n; i++) {
        int64_t place = starts[keys[i]]++;
        sorted_ids[place] = ids[i], sorted_values[place] = values[i];
    }
    for (int64_t j = n_keys - 1; j > 0; j--) starts[j] = starts[j - 1];
    if (n_keys) starts[0] = 0;
}

/* An active latent of a token as the backward pass reads it: the row of its residual, its token, f and dL/df. */
typedef struct {
    int32_t place, token;
    float value, gradient;
} entry;

/* ------------------------------------------------------------------------------------------------------- products */

/* Blocks of rows lie far apart, so no hardware prefetcher follows: ask for those AHEAD. */
#define AHEAD 16

static inline void ask(const float *rows, int64_t r, int64_t n_rows, int64_t width, int64_t column, int64_t size) {
    if (r + AHEAD < n_rows)
        for (int64_t c = 0; c < size; c += LANES) __builtin_prefetch(rows + (r + AHEAD) * width + column + c, 0, 2);
}

/* A block of `size` values from memory, with zeros after them. */
static inline void load(lanes *block, const float *from, int64_t size) {
    if (size == BLOCK) {
        for (int q = 0; q < BLOCK / LANES; q++) block[q] = ((const lanes *)from)[q];
    } else {
        memset(block, 0, BLOCK * sizeof *from);
        memcpy(block, from, size * sizeof *from);
    }
}

static inline void store(float *to, const lanes *block, int64_t size) {
    if (size == BLOCK)
        for (int q = 0; q < BLOCK / LANES; q++) ((lanes *)to)[q] = block[q];
    else
        memcpy(to, block, size * sizeof *to);
}

/* One block of columns of all rows, each times scale[r][part] where scales are given. */
static void pack(const float *rows, int64_t n_rows, int64_t width, int64_t column, int64_t size, const float *scale,
                 int64_t n_parts, int64_t part, float *packed) {
    for (int64_t r = 0; r < n_rows; r++) {
        lanes block[BLOCK / LANES];
        ask(rows, r, n_rows, width, column, size);
        load(block, rows + r * width + column, size);
        float factor = scale ? scale[r * n_parts + part] : 1;
        for (int q = 0; q < BLOCK / LANES; q++) ((lanes *)(packed + r * BLOCK))[q] = factor * block[q];
    }
}

/* Store a block past the caches: what is written whole and read much later need not be read before it is written. */
static inline void stream(float *to, const lanes *block, int64_t size) {
    int whole = size == BLOCK && (uintptr_t)to % 64 == 0;
#if defined(__AVX512F__)
    if (whole) {
        for (int q = 0; q < BLOCK / LANES; q++) _mm512_stream_ps(to + q * LANES, (__m512)block[q]);
        return;
    }
#elif defined(__AVX2__)
    if (whole) {
        const float *from = (const float *)block;
        for (int q = 0; q < BLOCK; q += 8) _mm256_stream_ps(to + q, _mm256_loadu_ps(from + q));
        return;
    }
#endif
    (void)whole;
    memcpy(to, block, size * sizeof *to);
}

/* Make streamed stores visible to other threads. */
static inline void settle(void) {
#if defined(__AVX512F__) || defined(__AVX2__)
    _mm_sfence();
#endif
}

/* out[b] = bias + sum over the entries i of bag b of weights[i] rows[ids[i]]; no bias is 0. */
void bags(const int64_t *ids, const float *weights, const int64_t *starts, int64_t n_entries, int64_t n_bags,
          const float *rows, int64_t n_rows, const float *bias, int64_t width, int64_t begin, int64_t end, float *out,
          float *packed) {
    for (int64_t column = 0; column < width; column += BLOCK) {
        int64_t size = width - column < BLOCK ? width - column : BLOCK;
        pack(rows, n_rows, width, column, size, 0, 0, 0, packed);
        for (int64_t b = begin; b < end; b++) {
            int64_t stop = b + 1 < n_bags ? starts[b + 1] : n_entries;
            lanes sums[BLOCK / LANES] = {{0}};
            if (bias) load(sums, bias + column, size);
            lanes a = sums[0], c = sums[1], d = sums[2], e = sums[3];
            for (int64_t i = starts[b]; i < stop; i++) {
                const lanes *row = (const lanes *)(packed + ids[i] * BLOCK);
                a += weights[i] * row[0], c += weights[i] * row[1], d += weights[i] * row[2], e += weights[i] * row[3];
            }
            sums[0] = a, sums[1] = c, sums[2] = d, sums[3] = e;
            store(out + b * width + column, sums, size);
        }
    }
}

static inline float total(lanes v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
#endif
}

/* out[e] += sum of the lanes of v[e], for LANES vectors. */
static inline void add_totals(const lanes *v, float *out) {
#if defined(__AVX512F__)
    /* Four rounds, each of which folds two vectors into one: 15 additions in place of 16 reductions. */
    __m512 a[8], b[4], c[2];
    for (int e = 0; e < 8; e++)
        a[e] = _mm512_shuffle_f32x4((__m512)v[e], (__m512)v[e + 8], 0x44) + _mm512_shuffle_f32x4((__m512)v[e], (__m512)v[e + 8], 0xee);
    for (int e = 0; e < 4; e++)
        b[e] = _mm512_shuffle_f32x4(a[e], a[e + 4], 0x88) + _mm512_shuffle_f32x4(a[e], a[e + 4], 0xdd);
    for (int e = 0; e < 2; e++) c[e] = _mm512_shuffle_ps(b[e], b[e + 2], 0x44) + _mm512_shuffle_ps(b[e], b[e + 2], 0xee);
    __m512 sums = _mm512_shuffle_ps(c[0], c[1], 0x88) + _mm512_shuffle_ps(c[0], c[1], 0xdd);
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    _mm512_storeu_ps(out, _mm512_loadu_ps(out) + _mm512_permutexvar_ps(order, sums));
#else
    for (int e = 0; e < LANES; e++) out[e] += total(v[e]);
#endif
}

/* For the tokens of a range: residual = goal - bias - sum over their entries of weights[i] rows[ids[i]]; the squared
   norm of each of the n_parts parts of a residual; and dots[part][i], the product of part and row of each entry.
   A part is width / n_parts columns; no bias is 0. */
void residuals(const int64_t *ids, const float *weights, const int64_t *starts, int64_t n_entries, int64_t n_tokens,
               const float *rows, int64_t n_rows, const float *bias, const float *goal, int64_t width, int64_t n_parts,
               int64_t begin, int64_t end, float *residual, float *squares, float *dots, float *packed) {
    int64_t part_width = width / n_parts;
    memset(squares + begin * n_parts, 0, (end - begin) * n_parts * sizeof *squares);
    for (int64_t part = 0; part < n_parts; part++) {
        float *products = dots + part * n_entries;
        int64_t first = starts[begin], last = end < n_tokens ? starts[end] : n_entries;
        memset(products + first, 0, (last - first) * sizeof *products);
        for (int64_t column = part * part_width; column < (part + 1) * part_width; column += BLOCK) {
            int64_t left = (part + 1) * part_width - column, size = left < BLOCK ? left : BLOCK;
            lanes sums[BLOCK / LANES], biases[BLOCK / LANES] = {{0}};
            pack(rows, n_rows, width, column, size, 0, 0, 0, packed);
            if (bias) load(biases, bias + column, size);
            for (int64_t t = begin; t < end; t++) {
                int64_t start = starts[t], stop = t + 1 < n_tokens ? starts[t + 1] : n_entries;
                load(sums, goal + t * width + column, size);
                lanes a = sums[0] - biases[0], b = sums[1] - biases[1], c = sums[2] - biases[2], d = sums[3] - biases[3];
                for (int64_t i = start; i < stop; i++) {
                    const lanes *row = (const lanes *)(packed + ids[i] * BLOCK);
                    a -= weights[i] * row[0], b -= weights[i] * row[1], c -= weights[i] * row[2], d -= weights[i] * row[3];
                }
                sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
                store(residual + t * width + column, sums, size);
                squares[t * n_parts + part] += total((a * a + b * b) + (c * c + d * d));
                for (int64_t i = start; i < stop; i += LANES) {
                    lanes v[LANES];
                    int n = stop - i < LANES ? stop - i : LANES;
                    for (int e = 0; e < LANES; e++) {
                        const lanes *row = (const lanes *)(packed + ids[e < n ? i + e : i] * BLOCK);
                        v[e] = (a * row[0] + b * row[1]) + (c * row[2] + d * row[3]);
                    }
                    if (n == LANES) {
                        add_totals(v, products + i);
                    } else {
                        float some[LANES] = {0};
                        add_totals(v, some);
                        for (int e = 0; e < n; e++) products[i + e] += some[e];
                    }
                }
            }
        }
    }
}

/* How many entries each latent has, added to counts; latent l stands for columns[l] where columns are given. */
void count_entries(const int64_t *latents, const int64_t *columns, int64_t n, int64_t *counts) {
    for (int64_t i = 0; i < n; i++) counts[columns ? columns[latents[i]] : latents[i]]++;
}

/* Put the entries of one set where their latents' entries go on (from cursors, which move), with the gradient
   direct[i] + sum over parts of scale[token][part] dots[part][i], no direct being 0; sums gets it for each latent. */
void place_entries(const int64_t *tokens, const int64_t *latents, const int64_t *columns, const float *values, int64_t n,
                   const float *dots, const float *scale, int64_t n_parts, const float *direct, int64_t first_place,
                   int64_t *cursors, float *sums, entry *sorted) {
    for (int64_t i = 0; i < n; i++) {
        int64_t token = tokens[i], latent = columns ? columns[latents[i]] : latents[i];
        float gradient = direct ? direct[i] : 0;
        for (int64_t part = 0; part < n_parts; part++)
            gradient += scale[token * n_parts + part] * dots[part * n + i];
        sums[latent] += gradient;
        sorted[cursors[latent]++] = (entry){first_place + token, token, values[i], gradient};
    }
}

/* For the latents of a range, over their entries: dec_grad = sum of value scale[place] y[place] and
   enc_grad = sum of gradient x[token]; squares: of both. ends: one past each latent's last entry. */
void row_gradients(const entry *entries, const int64_t *ends, const float *y, int64_t n_places, const float *scale,
                   const float *x, int64_t n_tokens, int64_t width, int64_t n_parts, int64_t begin, int64_t end,
                   float *dec_grad, float *enc_grad, float *squares, float *packed) {
    float *packed_x = packed + n_places * BLOCK;
    int64_t part_width = width / n_parts;
    memset(squares + begin, 0, (end - begin) * sizeof *squares);
    for (int64_t part = 0; part < n_parts; part++)
        for (int64_t column = part * part_width; column < (part + 1) * part_width; column += BLOCK) {
            int64_t left = (part + 1) * part_width - column, size = left < BLOCK ? left : BLOCK;
            pack(y, n_places, width, column, size, scale, n_parts, part, packed);
            pack(x, n_tokens, width, column, size, 0, 0, 0, packed_x);
            for (int64_t j = begin; j < end; j++) {
                lanes a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
                for (int64_t i = j ? ends[j - 1] : 0; i < ends[j]; i++) {
                    const lanes *of_y = (const lanes *)(packed + entries[i].place * BLOCK);
                    const lanes *of_x = (const lanes *)(packed_x + entries[i].token * BLOCK);
                    float v = entries[i].value, o = entries[i].gradient;
                    a += v * of_y[0], b += v * of_y[1], c += v * of_y[2], d += v * of_y[3];
                    e += o * of_x[0], f += o * of_x[1], g += o * of_x[2], h += o * of_x[3];
                }
                lanes dec[] = {a, b, c, d}, enc[] = {e, f, g, h};
                squares[j] += total(((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h)));
                stream(dec_grad + j * width + column, dec, size);
                stream(enc_grad + j * width + column, enc, size);
            }
        }
    settle();
}

/* ------------------------------------------------------------------------------------------------------------- relu */

/* Columns begin to end of f = max(f + bias, 0) in place, how many entries of each are positive, and their sums. Rows
   begin `distance` apart. */
void relu_count(float *restrict f, int64_t distance, const float *restrict bias, int64_t n_tokens, int64_t begin,
                int64_t end, float *restrict counts, float *restrict sums) {
    memset(counts + begin, 0, (end - begin) * sizeof *counts);
    memset(sums + begin, 0, (end - begin) * sizeof *sums);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t j = begin; j < end; j++) {
            float value = f[t * distance + j] + bias[j];
            value = value < 0 ? 0 : value; /* keeps NaN */
            counts[j] += value > 0 ? 1.0f : 0.0f;
            sums[j] += value;
            f[t * distance + j] = value;
        }
}

/* Columns begin to end of gradient = (gradient + penalty) where f > 0, else 0, in place, and their sums over tokens.
   Rows of both begin `distance` apart. */
void relu_backward(float *restrict gradient, const float *restrict f, int64_t distance, const float *restrict penalty,
                   int64_t n_tokens, int64_t begin, int64_t end, float *restrict sums) {
    memset(sums + begin, 0, (end - begin) * sizeof *sums);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t j = begin; j < end; j++) {
            float value = gradient[t * distance + j] + penalty[j];
            value = f[t * distance + j] > 0 ? value : 0;
            gradient[t * distance + j] = value;
            sums[j] += value;
        }
}

/* Rows begin to end of gradient += factors[row] rows[row], and the sum of the squares of each. */
void add_rows(float *restrict gradient, const float *restrict factors, const float *restrict rows, int64_t width,
              int64_t begin, int64_t end, float *restrict squares) {
    for (int64_t r = begin; r < end; r++) {
        float *to = gradient + r * width;
        const float *from = rows + r * width;
        lanes sum = {0};
        float rest = 0;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            lanes value = *(const lanes *)(to + i) + factors[r] * *(const lanes *)(from + i);
            __builtin_prefetch(to + i + SUMMED, 1, 2), __builtin_prefetch(from + i + SUMMED, 0, 2);
            *(lanes *)(to + i) = value, sum += value * value;
        }
        for (; i < width; i++) to[i] += factors[r] * from[i], rest += to[i] * to[i];
        squares[r] = total(sum) + rest;
    }
}

/* -------------------------------------------------------------------------------------------------------- optimiser */

/* Euclidean norms of rows begin to end. */
void row_norms(const float *rows, int64_t width, int64_t begin, int64_t end, float *norms) {
    for (int64_t r = begin; r < end; r++) {
        const float *row = rows + r * width;
        lanes sum = {0};
        float rest = 0;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) sum += *(const lanes *)(row + i) * *(const lanes *)(row + i);
        for (; i < width; i++) rest += row[i] * row[i];
        norms[r] = sqrtf(total(sum) + rest);
    }
}

/* Sums of squares of blocks begin to end of SUMMED values each. */
void sum_squares(const float *values, int64_t n, int64_t begin, int64_t end, double *sums) {
    for (int64_t block = begin; block < end; block++) {
        int64_t i = block * SUMMED, stop = n - i < SUMMED ? n : i + SUMMED;
        lanes a = {0}, b = {0};
        float rest = 0;
        for (; i + 2 * LANES <= stop; i += 2 * LANES) {
            const lanes *v = (const lanes *)(values + i);
            __builtin_prefetch(values + i + 2 * SUMMED, 0, 2), __builtin_prefetch(values + i + 2 * SUMMED + LANES, 0, 2);
            a += v[0] * v[0], b += v[1] * v[1];
        }
        for (; i < stop; i++) rest += values[i] * values[i];
        sums[block] = total(a + b) + rest;
    }
}

/* One step of Adam on rows begin to end, with gradients times `scale`; then the norms of the rows where wanted.
   correction1 and correction2 are 1 - beta1^step and 1 - beta2^step. */
void adam(float *parameter, const float *gradient, float *mean, float *square, int64_t width, int64_t begin,
          int64_t end, float scale, float rate, float beta1, float beta2, float epsilon, float correction1,
          float correction2, float *norms) {
    float step = rate / correction1, root = 1 / sqrtf(correction2);
    for (int64_t r = begin; r < end; r++) {
        for (int64_t block = r * width; block < (r + 1) * width; block += BLOCK) {
            int64_t stop = (r + 1) * width - block < BLOCK ? (r + 1) * width : block + BLOCK;
            for (int64_t i = block + 8 * BLOCK; i < block + 9 * BLOCK; i += LANES) {
                __builtin_prefetch(parameter + i, 1, 2), __builtin_prefetch(gradient + i, 0, 2);
                __builtin_prefetch(mean + i, 1, 2), __builtin_prefetch(square + i, 1, 2);
            }
            for (int64_t i = block; i < stop; i++) {
                float g = gradient[i] * scale;
                mean[i] += (1 - beta1) * (g - mean[i]);
                square[i] = beta2 * square[i] + (1 - beta2) * g * g;
                parameter[i] -= step * mean[i] / (sqrtf(square[i]) * root + epsilon);
            }
        }
        if (norms) row_norms(parameter, width, r, r + 1, norms);
    }
}
