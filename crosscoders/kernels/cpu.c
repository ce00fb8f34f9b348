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
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* ------------------------------------------------------------------------------------------------------ selection */

/* Bit i: value[i] > bound[i]. */
static inline uint32_t above(const float *value, const float *bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(value), _mm512_loadu_ps(bound), _CMP_GT_OQ);
#elif defined(__AVX2__)
    __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(value), _mm256_loadu_ps(bound), _CMP_GT_OQ);
    __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(value + 8), _mm256_loadu_ps(bound + 8), _CMP_GT_OQ);
    return (uint32_t)_mm256_movemask_ps(low) | (uint32_t)_mm256_movemask_ps(high) << 8;
#else
    uint32_t mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (uint32_t)(value[i] > bound[i]) << i;
    return mask;
#endif
}

/* Entries with pre[t][j] > gate[j] in ascending order, with scaled = pre[t][j] weight[j]. Returns how many there are;
   the first `room` of them are stored. */
int64_t select_above(const float *pre, const float *gate, const float *weight, int64_t dict_size, int64_t begin,
                     int64_t end, int64_t room, int64_t *tokens, int64_t *latents, float *values, float *scaled) {
    int64_t n = 0;
    for (int64_t t = begin; t < end; t++) {
        const float *row = pre + t * dict_size;
        for (int64_t j = 0; j < dict_size; j += LANES) {
            uint32_t mask = 0;
            if (j + LANES <= dict_size)
                mask = above(row + j, gate + j);
            else
                for (int64_t i = j; i < dict_size; i++) mask |= (uint32_t)(row[i] > gate[i]) << (i - j);
            for (; mask; mask &= mask - 1, n++) {
                int64_t i = j + __builtin_ctz(mask);
                if (n >= room) continue;
                tokens[n] = t, latents[n] = i, values[n] = row[i], scaled[n] = row[i] * weight[i];
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

/* For each token the k largest positive pre[t][columns[c]] weight[c], ascending by c, ties to lower ones. Returns how
   many they are in all; tokens, places (c) and values (pre) have room for k a token, scratch for n_columns floats and 15 more. */
int64_t largest_per_token(const float *pre, const int64_t *columns, const float *weight, int64_t dict_size,
                          int64_t n_columns, int64_t k, int64_t begin, int64_t end, int64_t *tokens, int64_t *places,
                          float *values, float *restrict scratch) {
    int64_t n_all = 0, n_padded = (n_columns + LANES - 1) / LANES * LANES;
    memset(scratch, 0, n_padded * sizeof *scratch);
    for (int64_t t = begin; t < end; t++) {
        const float *row = pre + t * dict_size;
        int64_t n_ties = k;
        int32_t n_positive = 0;
        for (int64_t c = 0; c < n_columns; c++) {
            float value = row[columns[c]] * weight[c];
            scratch[c] = value > 0 ? value : 0;
        }
        for (int64_t c = 0; c < n_columns; c++) n_positive += scratch[c] > 0;
        float cut = n_positive > k ? cut_at(scratch, n_columns, k, &n_ties) : 0, below[LANES];
        bits before;
        memcpy(&before, &cut, sizeof cut);
        before -= before > 0;
        for (int i = 0; i < LANES; i++) memcpy(below + i, &before, sizeof before);
        for (int64_t block = 0; block < n_padded; block += LANES)
            for (uint32_t mask = above(scratch + block, below); mask; mask &= mask - 1) {
                int64_t c = block + __builtin_ctz(mask);
                if (scratch[c] == cut && n_ties-- <= 0) continue;
                tokens[n_all] = t, places[n_all] = c, values[n_all++] = row[columns[c]];
            }
    }
    return n_all;
}

/* The entries in stable order of their keys; starts: the first place of each key; sums: of `others`, for each key. */
void sort_by_key(const int64_t *keys, const int64_t *ids, const float *values, const float *others, int64_t n,
                 int64_t n_keys, int64_t *starts, float *sums, int64_t *sorted_ids, float *sorted_values, float *sorted_others) {
    memset(starts, 0, n_keys * sizeof *starts);
    memset(sums, 0, n_keys * sizeof *sums);
    for (int64_t i = 0; i < n; i++) starts[keys[i]]++;
    for (int64_t j = 0, sum = 0; j < n_keys; j++) {
        int64_t count = starts[j];
        starts[j] = sum;
        sum += count;
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t place = starts[keys[i]]++;
        sums[keys[i]] += others[i];
        sorted_ids[place] = ids[i], sorted_values[place] = values[i], sorted_others[place] = others[i];
    }
    for (int64_t j = n_keys - 1; j > 0; j--) starts[j] = starts[j - 1];
    if (n_keys) starts[0] = 0;
}

/* ------------------------------------------------------------------------------------------------------- products */

static void pack(const float *rows, int64_t n_rows, int64_t width, int64_t column, int64_t size, float *packed) {
    for (int64_t r = 0; r < n_rows; r++) {
        memcpy(packed + r * BLOCK, rows + r * width + column, size * sizeof *rows);
        memset(packed + r * BLOCK + size, 0, (BLOCK - size) * sizeof *packed);
    }
}

/* out[b] = bias + sum over the entries i of bag b of weights[i] rows[ids[i]]; no bias is 0. */
void bags(const int64_t *ids, const float *weights, const int64_t *starts, int64_t n_entries, int64_t n_bags,
          const float *rows, int64_t n_rows, const float *bias, int64_t width, int64_t begin, int64_t end, float *out,
          float *packed) {
    for (int64_t column = 0; column < width; column += BLOCK) {
        int64_t size = width - column < BLOCK ? width - column : BLOCK;
        pack(rows, n_rows, width, column, size, packed);
        for (int64_t b = begin; b < end; b++) {
            int64_t stop = b + 1 < n_bags ? starts[b + 1] : n_entries;
            float sum[BLOCK] __attribute__((aligned(64))) = {0};
            if (bias) memcpy(sum, bias + column, size * sizeof *sum);
            lanes *sums = (lanes *)sum;
            lanes a = sums[0], c = sums[1], d = sums[2], e = sums[3];
            for (int64_t i = starts[b]; i < stop; i++) {
                const lanes *row = (const lanes *)(packed + ids[i] * BLOCK);
                a += weights[i] * row[0], c += weights[i] * row[1], d += weights[i] * row[2], e += weights[i] * row[3];
            }
            sums[0] = a, sums[1] = c, sums[2] = d, sums[3] = e;
            memcpy(out + b * width + column, sum, size * sizeof *sum);
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

/* out[i] = <left[left_ids[i]], right[right_ids[i]]>; entries that follow each other should share left rows. */
void dots(const int64_t *left_ids, const int64_t *right_ids, const float *left, const float *right, int64_t n_right,
          int64_t width, int64_t begin, int64_t end, float *out, float *packed) {
    memset(out + begin, 0, (end - begin) * sizeof *out);
    for (int64_t column = 0; column < width; column += BLOCK) {
        int64_t size = width - column < BLOCK ? width - column : BLOCK;
        pack(right, n_right, width, column, size, packed);
        for (int64_t i = begin; i < end; i++) {
            const float *a = left + left_ids[i] * width + column, *b = packed + right_ids[i] * BLOCK;
            if (size == BLOCK) {
                const lanes *x = (const lanes *)a, *y = (const lanes *)b;
                out[i] += total((x[0] * y[0] + x[1] * y[1]) + (x[2] * y[2] + x[3] * y[3]));
            } else {
                for (int64_t c = 0; c < size; c++) out[i] += a[c] * b[c];
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- relu */

/* Columns begin to end of f = max(f, 0) in place, and how many entries of each are positive. */
void relu_count(float *restrict f, int64_t n_tokens, int64_t dict_size, int64_t begin, int64_t end,
                float *restrict counts) {
    memset(counts + begin, 0, (end - begin) * sizeof *counts);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t j = begin; j < end; j++) {
            float value = f[t * dict_size + j];
            counts[j] += value > 0 ? 1.0f : 0.0f;
            f[t * dict_size + j] = value < 0 ? 0 : value; /* keeps NaN */
        }
}

/* Columns begin to end of gradient = (gradient + penalty) where f > 0, else 0, in place, and their sums over tokens. */
void relu_backward(float *restrict gradient, const float *restrict f, const float *restrict penalty, int64_t n_tokens,
                   int64_t dict_size, int64_t begin, int64_t end, float *restrict sums) {
    memset(sums + begin, 0, (end - begin) * sizeof *sums);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t j = begin; j < end; j++) {
            float value = gradient[t * dict_size + j] + penalty[j];
            value = f[t * dict_size + j] > 0 ? value : 0;
            gradient[t * dict_size + j] = value;
            sums[j] += value;
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

/* One step of Adam on rows begin to end, with gradients times `scale`; then the norms of the rows where wanted.
   correction1 and correction2 are 1 - beta1^step and 1 - beta2^step. */
void adam(float *parameter, const float *gradient, float *mean, float *square, int64_t width, int64_t begin,
          int64_t end, float scale, float rate, float beta1, float beta2, float epsilon, float correction1,
          float correction2, float *norms) {
    float step = rate / correction1, root = 1 / sqrtf(correction2);
    for (int64_t r = begin; r < end; r++) {
        for (int64_t i = r * width; i < (r + 1) * width; i++) {
            float g = gradient[i] * scale;
            mean[i] += (1 - beta1) * (g - mean[i]);
            square[i] = beta2 * square[i] + (1 - beta2) * g * g;
            parameter[i] -= step * mean[i] / (sqrtf(square[i]) * root + epsilon);
        }
        if (norms) row_norms(parameter, width, r, r + 1, norms);
    }
}
