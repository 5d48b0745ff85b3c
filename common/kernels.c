/* Inner loops of the batched engine; what each computes, and the shapes, is said in common/kernels.py.
 *
 * Arithmetic is on vectors of eight floats, as GCC and clang have them. Where the cell's rows end within a vector it is
 * padded, so that a number goes through the same operations wherever it stands. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif

typedef int64_t size;
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));

#define LOG2E 1.44269504f
#define LN2 0.69314718f
static inline v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }

static inline v8 load(const float *from, size left)
{
    if (left >= 8) return *(const v8 *)from;
    v8 value = {0};
    memcpy(&value, from, left * sizeof(float));
    return value;
}

static inline void store(float *to, v8 value, size left)
{
    if (left >= 8) *(v8 *)to = value;
    else memcpy(to, &value, left * sizeof(float));
}

static inline float add_up(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

static inline v8 pick(i8 which, v8 one, v8 other) { return (v8)((which & (i8)one) | (~which & (i8)other)); }

static inline v8 larger(v8 x, v8 y) { return pick(x > y, x, y); }

/* 2^x to 2 ulp, between 2^-126 and 2^127, NaN of NaN: by a polynomial of degree 6 on [-1/2, 1/2]. */
static inline v8 power_of_2(v8 x)
{
    const v8 nearest = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to whole numbers */
    v8 bounded = pick(x > 127, all(127), x);
    bounded = pick(bounded < -126, all(-126), bounded);
    v8 whole = (bounded + nearest) - nearest, part = bounded - whole;
    v8 power = all(1.53375775e-4f);
    power = power * part + 1.33998599e-3f;
    power = power * part + 9.61851981e-3f;
    power = power * part + 5.55032901e-2f;
    power = power * part + 2.40226462e-1f;
    power = power * part + 6.93147182e-1f;
    power = power * part + 1;
    i8 exponent = (__builtin_convertvector(whole, i8) + 127) << 23;
    return power * (v8)exponent;
}

static inline v8 sigmoid(v8 x) { return 1 / (1 + power_of_2(-LOG2E * x)); }
static inline v8 tanh_of(v8 x) { return 2 / (1 + power_of_2(-2 * LOG2E * x)) - 1; }

/* Tiles that stay in sixteen registers: with all loops over one unrolled, its numbers never see memory. */
enum { TALL = 6, HIGH = 4, BROAD = 3, GROUP = 4 * TALL, PANEL = 16 };
#define UNROLLED(i, count) _Pragma("GCC unroll 6") for (int i = 0; i < (count); i++)

static inline size padded(size columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

/* A matrix for `product`, PANEL columns at a time, filled up with 0; returns what lies behind. */
static float *pack(size depth, size columns, const float *from, size by_depth, size by_column, float *to)
{
    for (size c = 0; c < columns; c += PANEL)
        for (size k = 0; k < depth; k++)
            for (size j = c; j < c + PANEL; j++) *to++ = j < columns ? from[k * by_depth + j * by_column] : 0;
    return to;
}

/* Up to GROUP rows of x, of `depth` numbers and `row` apart, times a packed matrix, into GROUP rows of padded columns:
 * each number is the same sum in the same order, whichever row it is in. */
static void product(size rows, size depth, const float *x, size row, const float *packed, size columns, float *into)
{
    for (size c = 0; c < columns; c += PANEL, packed += depth * PANEL)
        for (size r = 0; r < rows; r += TALL) {
            const float *read[TALL];
            v8 sums[TALL][2];
            UNROLLED(i, TALL) read[i] = x + (r + i < rows ? r + i : rows - 1) * row;
            UNROLLED(i, TALL) sums[i][0] = sums[i][1] = (v8){0};
            for (size k = 0; k < depth; k++) {
                v8 low = *(const v8 *)(packed + k * PANEL), high = *(const v8 *)(packed + k * PANEL + 8);
                UNROLLED(i, TALL) {
                    v8 one = all(read[i][k]);
                    sums[i][0] += one * low;
                    sums[i][1] += one * high;
                }
            }
            UNROLLED(i, TALL) {
                *(v8 *)(into + (r + i) * columns + c) = sums[i][0];
                *(v8 *)(into + (r + i) * columns + c + 8) = sums[i][1];
            }
        }
}

/* The scans go through all steps with a few devices before they begin with others, whose numbers then stay in the cache.
 * For each device b of those and each eight of its `count` numbers, from j on: */
#define GROUPS for (size first = 0, some; some = devices - first < GROUP ? devices - first : GROUP, some > 0; first += some)
#define EACH(count) for (size b = 0; b < some; b++) for (size j = 0, left = (count); left > 0; j += 8, left -= 8)
#define AT(matrix, row, column) load((matrix) + b * (row) + (column) + j, left)
#define PUT(matrix, row, column, value) store((matrix) + b * (row) + (column) + j, value, left)

void gru_scan(size steps, size devices, size n, size row, float *inputs, float *reset, float *opened, float *fresh,
              const float *gates, const float *candidate, float *scratch)
{
    size wide = padded(2 * n), narrow = padded(n), own = row - n;
    float *open = scratch, *drive = pack(row, 2 * n, gates, 1, row, open), *out = pack(row, n, candidate, 1, row, drive);
    GROUPS for (size t = 0; t < steps; t++) {
        size at = t * devices + first;
        float *read = inputs + at * row, *state = read + own, *next = state + devices * row;
        float *again = reset + at * row, *o = opened + at * 2 * n, *f = fresh + at * n;
        product(some, row, read, row, open, wide, out);
        EACH(n) {
            v8 kept = sigmoid(AT(out, wide, n));
            PUT(o, 2 * n, 0, sigmoid(AT(out, wide, 0)));
            PUT(o, 2 * n, n, kept);
            PUT(again, row, own, kept * AT(state, row, 0));
        }
        product(some, row, again, row, drive, narrow, out);
        EACH(n) {
            v8 new = tanh_of(AT(out, narrow, 0));
            PUT(f, n, 0, new);
            PUT(next, row, 0, new + AT(o, 2 * n, 0) * (AT(state, row, 0) - new));
        }
    }
}

void gru_scan_back(size steps, size devices, size n, size row, const float *inputs, const float *opened,
                   const float *fresh, const float *gates, const float *candidate, const float *wanted,
                   size wanted_step, size wanted_device, float *by_gates, float *by_fresh, float *by_inputs,
                   float *scratch)
{
    size x = row - n - 1, narrow = padded(n), width = narrow + padded(x);
    float *open = scratch, *drive = pack(2 * n, x, gates, row, 1, pack(2 * n, n, gates + x + 1, row, 1, open));
    float *later = pack(n, x, candidate, row, 1, pack(n, n, candidate + x + 1, row, 1, drive));
    float *out = later + GROUP * n, *more = out + GROUP * width;
    GROUPS {
        EACH(n) PUT(later, n, 0, AT(wanted + steps * wanted_step + first * wanted_device, wanted_device, 0));
        for (size t = steps - 1; t >= 0; t--) {
            size at = t * devices + first;
            const float *state = inputs + at * row + x + 1, *o = opened + at * 2 * n, *f = fresh + at * n;
            const float *asked = wanted + t * wanted_step + first * wanted_device;
            float *g = by_gates + at * 2 * n, *d = by_fresh + at * n, *i = by_inputs + at * x;
            EACH(n) {
                v8 due = AT(later, n, 0), keep = AT(o, 2 * n, 0), new = AT(f, n, 0), one = due - due * keep;
                PUT(g, 2 * n, 0, due * (AT(state, row, 0) - new) * (keep - keep * keep));
                PUT(d, n, 0, one - one * new * new);
            }
            product(some, n, d, n, drive, width, more);
            EACH(n) {
                v8 by_reset = AT(more, width, 0), kept = AT(o, 2 * n, n);
                PUT(g, 2 * n, n, by_reset * AT(state, row, 0) * (kept - kept * kept));
                PUT(later, n, 0, AT(later, n, 0) * AT(o, 2 * n, 0) + by_reset * kept + AT(asked, wanted_device, 0));
            }
            product(some, 2 * n, g, 2 * n, open, width, out);
            EACH(n) PUT(later, n, 0, AT(later, n, 0) + AT(out, width, 0));
            EACH(x) PUT(i, x, 0, AT(out, width, narrow) + AT(more, width, narrow));
        }
    }
}

void cfn_scan(size steps, size devices, size n, size row, float *inputs, float *opened, float *driven, float *squashed,
              const float *gates, const float *candidate, float *scratch)
{
    size x = row - n - 1, wide = padded(2 * n), narrow = padded(n);
    float *open = scratch, *drive = pack(row, 2 * n, gates, 1, row, open), *out = pack(x, n, candidate, 1, x, drive);
    float *more = out + GROUP * wide;
    GROUPS for (size t = 0; t < steps; t++) {
        size at = t * devices + first;
        float *read = inputs + at * row, *state = read + x + 1, *next = state + devices * row;
        float *o = opened + at * 2 * n, *d = driven + at * n, *q = squashed + at * n;
        product(some, row, read, row, open, wide, out);
        product(some, x, read, row, drive, narrow, more);
        EACH(n) {
            v8 keep = sigmoid(AT(out, wide, 0)), take = sigmoid(AT(out, wide, n));
            v8 new = tanh_of(AT(more, narrow, 0)), old = tanh_of(AT(state, row, 0));
            PUT(o, 2 * n, 0, keep);
            PUT(o, 2 * n, n, take);
            PUT(d, n, 0, new);
            PUT(q, n, 0, old);
            PUT(next, row, 0, keep * old + take * new);
        }
    }
}

void cfn_scan_back(size steps, size devices, size n, size x, const float *opened, const float *driven,
                   const float *squashed, const float *gates, const float *candidate, const float *wanted,
                   size wanted_step, size wanted_device, float *by_gates, float *by_driven, float *by_inputs,
                   float *scratch)
{
    size row = x + 1 + n, narrow = padded(n), width = narrow + padded(x);
    float *open = scratch, *drive = pack(2 * n, x, gates, row, 1, pack(2 * n, n, gates + x + 1, row, 1, open));
    float *later = pack(n, x, candidate, x, 1, drive), *out = later + GROUP * n, *more = out + GROUP * width;
    GROUPS {
        EACH(n) PUT(later, n, 0, AT(wanted + steps * wanted_step + first * wanted_device, wanted_device, 0));
        for (size t = steps - 1; t >= 0; t--) {
            size at = t * devices + first;
            const float *o = opened + at * 2 * n, *e = driven + at * n, *q = squashed + at * n;
            const float *asked = wanted + t * wanted_step + first * wanted_device;
            float *g = by_gates + at * 2 * n, *d = by_driven + at * n, *i = by_inputs + at * x;
            EACH(n) {
                v8 due = AT(later, n, 0), keep = AT(o, 2 * n, 0), take = AT(o, 2 * n, n);
                v8 new = AT(e, n, 0), old = AT(q, n, 0), one = due * take, kept = due * keep;
                PUT(g, 2 * n, 0, due * old * (keep - keep * keep));
                PUT(g, 2 * n, n, due * new * (take - take * take));
                PUT(d, n, 0, one - one * new * new);
                PUT(later, n, 0, kept - kept * old * old + AT(asked, wanted_device, 0));
            }
            product(some, 2 * n, g, 2 * n, open, width, out);
            product(some, n, d, n, drive, padded(x), more);
            EACH(n) PUT(later, n, 0, AT(later, n, 0) + AT(out, width, 0));
            EACH(x) PUT(i, x, 0, AT(out, width, narrow) + AT(more, padded(x), 0));
        }
    }
}

/* x + weights to 2^(x - highest), in place; returns the sum and leaves the highest, at least `highest`, there. */
static inline float powers(float *x, const float *weights, size width, float *highest)
{
    v8 most = all(*highest), sum = {0};
    size j = 0;
    for (; j + 8 <= width; j += 8) {
        v8 value = *(v8 *)(x + j);
        if (weights) *(v8 *)(x + j) = value = value + *(const v8 *)(weights + j);
        most = larger(most, value);
    }
    for (; j < width; j++) {
        if (weights) x[j] += weights[j];
        most[0] = x[j] > most[0] ? x[j] : most[0];
    }
    float top = most[0];
    for (int lane = 1; lane < 8; lane++) top = most[lane] > top ? most[lane] : top;
    for (j = 0; j + 8 <= width; j += 8) sum += *(v8 *)(x + j) = power_of_2(*(v8 *)(x + j) - top);
    float total = add_up(sum);
    for (; j < width; j++) total += x[j] = power_of_2(all(x[j] - top))[0];
    *highest = top;
    return total;
}

static inline void scale(float *x, size width, float factor)
{
    size j = 0;
    for (; j + 8 <= width; j += 8) *(v8 *)(x + j) *= factor;
    for (; j < width; j++) x[j] *= factor;
}

void softmax_rows(size rows, size width, float *logits, const int64_t *items, float *log_probability)
{
    for (size r = 0; r < rows; r++) {
        float *x = logits + r * width, own = x[items[r]], highest = own;
        float sum = powers(x, 0, width, &highest);
        scale(x, width, 1 / sum);
        x[items[r]] -= 1;
        log_probability[r] = (own - highest) * LN2 - logf(sum);
    }
}

void sampled_rows(size rows, size width, float *logits, const float *log_weights, const int64_t *column,
                  const float *own, float *log_probability, float *missing)
{
    for (size r = 0; r < rows; r++) {
        float *x = logits + r * width, highest = own[r];
        if (column[r] >= 0) x[column[r]] = -INFINITY;
        float others = powers(x, log_weights, width, &highest);
        float normaliser = others + power_of_2(all(own[r] - highest))[0];
        scale(x, width, 1 / normaliser);
        log_probability[r] = (own[r] - highest) * LN2 - logf(normaliser);
        missing[r] = others / normaliser;
        if (column[r] >= 0) {
            x[column[r]] = -missing[r];
            missing[r] = 0;
        }
    }
}

/* TALL rows and 8 * wide columns of the sum over steps of delta^T x; `rows` of them exist. Returns their squares. */
static inline __attribute__((always_inline)) v8 tile(size steps, const float *delta, size outputs, const float *x,
                                                     size inputs, int wide, float *into, size rows)
{
    v8 sums[TALL][2], squares = {0};
        UNROLLED(r, TALL) UNROLLED(c, wide) sums[r][c] = (v8){0};
    for (size t = 0; t < steps; t++, delta += outputs, x += inputs) {
        v8 read[2];
        UNROLLED(c, wide) read[c] = *(const v8 *)(x + 8 * c);
        UNROLLED(r, TALL) {
            v8 one = all(delta[r]);
            UNROLLED(c, wide) sums[r][c] += one * read[c];
        }
    }
    UNROLLED(r, TALL) if (r < rows) UNROLLED(c, wide) {
        *(v8 *)(into + r * inputs + 8 * c) = sums[r][c];
        squares += sums[r][c] * sums[r][c];
    }
    return squares;
}

void form(size users, size steps, size outputs, size inputs, const float *delta, size delta_user, size delta_step,
            const float *x, size x_user, size x_step, float *into, float *squares, float *scratch)
{
    size tall = (outputs + TALL - 1) / TALL * TALL, whole = inputs / 8 * 8;
    float *d = scratch, *read = scratch + steps * tall;
    memset(scratch, 0, steps * tall * sizeof(float));
    for (size u = 0; u < users; u++, into += outputs * inputs) {
        for (size t = 0; t < steps; t++) {
            memcpy(d + t * tall, delta + u * delta_user + t * delta_step, outputs * sizeof(float));
            memcpy(read + t * inputs, x + u * x_user + t * x_step, inputs * sizeof(float));
        }
        v8 sum = {0};
        for (size r = 0; r < outputs; r += TALL) {
            size rows = outputs - r < TALL ? outputs - r : TALL, c = 0;
            float *to = into + r * inputs;
            for (; c + 16 <= whole; c += 16) sum += tile(steps, d + r, tall, read + c, inputs, 2, to + c, rows);
            for (; c < whole; c += 8) sum += tile(steps, d + r, tall, read + c, inputs, 1, to + c, rows);
        }
        for (size c = whole; c < inputs; c++)
            for (size r = 0; r < outputs; r += 8) {
                v8 column = {0};
                for (size t = 0; t < steps; t++) column += load(d + t * tall + r, outputs - r) * read[t * inputs + c];
                for (size k = 0; k < 8 && r + k < outputs; k++) into[(r + k) * inputs + c] = column[k];
                sum += column * column;
            }
        squares[u] = add_up(sum);
    }
}

void gram(size users, size steps, size width, const float *values, float *into)
{
    for (size u = 0; u < users; u++, values += steps * width, into += steps * steps)
        for (size a = 0; a < steps; a += HIGH)
            for (size b = a; b < steps; b += BROAD) {
                const float *rows[HIGH], *columns[BROAD];
                v8 sums[HIGH][BROAD];
                UNROLLED(r, HIGH) rows[r] = values + (a + r < steps ? a + r : a) * width;
                UNROLLED(c, BROAD) columns[c] = values + (b + c < steps ? b + c : b) * width;
                UNROLLED(r, HIGH) UNROLLED(c, BROAD) sums[r][c] = (v8){0};
                size j = 0;
                for (; j + 8 <= width; j += 8) {
                    v8 read[BROAD];
                    UNROLLED(c, BROAD) read[c] = *(const v8 *)(columns[c] + j);
                    UNROLLED(r, HIGH) {
                        v8 one = *(const v8 *)(rows[r] + j);
                        UNROLLED(c, BROAD) sums[r][c] += one * read[c];
                    }
                }
                for (size r = 0; r < HIGH && a + r < steps; r++)
                    for (size c = 0; c < BROAD && b + c < steps; c++) {
                        float sum = add_up(sums[r][c]);
                        for (size rest = j; rest < width; rest++) sum += rows[r][rest] * columns[c][rest];
                        into[(a + r) * steps + b + c] = into[(b + c) * steps + a + r] = sum;
                    }
            }
}

/* Of each user's steps, those with the same id are added up; `slots` holds 2^bits > steps numbers. */
void row_squares(size users, size steps, size width, const float *delta, size delta_user, size delta_step,
                 const int64_t *ids, float *squares, float *sums, int32_t *slots, size bits)
{
    for (size u = 0; u < users; u++, ids += steps) {
        size used = 0;
        memset(slots, -1, sizeof(int32_t) << bits);
        for (size t = 0; t < steps; t++) {
            const float *row = delta + u * delta_user + t * delta_step;
            uint64_t slot = (uint64_t)ids[t] * 0x9E3779B97F4A7C15u >> (64 - bits);
            while (slots[slot] >= 0 && ids[slots[slot] / steps] != ids[t]) slot = (slot + 1) & ((1 << bits) - 1);
            if (slots[slot] < 0) {
                slots[slot] = (int32_t)(t * steps + used);
                memcpy(sums + width * used++, row, width * sizeof(float));
            } else {
                float *sum = sums + slots[slot] % steps * width;
                for (size j = 0; j < width; j++) sum[j] += row[j];
            }
        }
        v8 total = {0};
        for (size j = 0; j < used * width; j += 8) {
            v8 sum = load(sums + j, used * width - j);
            total += sum * sum;
        }
        squares[u] = add_up(total);
    }
}

/* fixed += total * factor, rounded; returns how many were not within 2^51, for which adding 1.5 * 2^52 rounds. */
int64_t add_fixed(size count, const float *total, double factor, int64_t *fixed)
{
    const double nearest = 6755399441055744.0;
    int64_t beyond = 0, zero;
    memcpy(&zero, &nearest, sizeof zero);
    for (size j = 0; j < count; j++) {
        double value = total[j] * factor, moved = value + nearest;
        int64_t bits;
        memcpy(&bits, &moved, sizeof bits);
        beyond += !(fabs(value) < 2251799813685248.0);
        fixed[j] += bits - zero;
    }
    return beyond;
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
