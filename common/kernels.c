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

/* For each device b and each eight of its n numbers, from j on. */
#define EACH for (size b = 0; b < devices; b++) for (size j = 0; j < n; j += 8)
#define AT(matrix, row, column) load((matrix) + b * (row) + (column) + j, n - j)
#define PUT(matrix, row, column, value) store((matrix) + b * (row) + (column) + j, value, n - j)

void gru_open(size devices, size n, float *gates, const float *state, float *left, size row)
{
    EACH {
        v8 kept = sigmoid(AT(gates, 2 * n, n));
        PUT(gates, 2 * n, 0, sigmoid(AT(gates, 2 * n, 0)));
        PUT(gates, 2 * n, n, kept);
        PUT(left, row, 0, kept * AT(state, row, 0));
    }
}

void gru_close(size devices, size n, const float *gates, float *fresh, const float *state, float *next, size row)
{
    EACH {
        v8 new = tanh_of(AT(fresh, n, 0));
        PUT(fresh, n, 0, new);
        PUT(next, row, 0, new + AT(gates, 2 * n, 0) * (AT(state, row, 0) - new));
    }
}

void gru_back(size devices, size n, const float *later, const float *gates, const float *fresh, const float *state,
              size row, float *by_gates, float *by_fresh)
{
    EACH {
        v8 wanted = AT(later, n, 0), keep = AT(gates, 2 * n, 0), new = AT(fresh, n, 0), one = wanted - wanted * keep;
        PUT(by_gates, 2 * n, 0, wanted * (AT(state, row, 0) - new) * (keep - keep * keep));
        PUT(by_fresh, n, 0, one - one * new * new);
    }
}

void gru_back_left(size devices, size n, float *later, const float *by_left, const float *gates, const float *state,
                   size row, float *by_gates, const float *wanted, size wanted_row)
{
    EACH {
        v8 left = AT(by_left, n, 0), kept = AT(gates, 2 * n, n);
        PUT(by_gates, 2 * n, n, left * AT(state, row, 0) * (kept - kept * kept));
        PUT(later, n, 0, AT(later, n, 0) * AT(gates, 2 * n, 0) + left * kept + AT(wanted, wanted_row, 0));
    }
}

void cfn_step(size devices, size n, float *gates, float *driven, float *squashed, const float *state, float *next,
              size row)
{
    EACH {
        v8 keep = sigmoid(AT(gates, 2 * n, 0)), take = sigmoid(AT(gates, 2 * n, n));
        v8 drive = tanh_of(AT(driven, n, 0)), old = tanh_of(AT(state, row, 0));
        PUT(gates, 2 * n, 0, keep);
        PUT(gates, 2 * n, n, take);
        PUT(driven, n, 0, drive);
        PUT(squashed, n, 0, old);
        PUT(next, row, 0, keep * old + take * drive);
    }
}

void cfn_back(size devices, size n, float *later, const float *gates, const float *driven, const float *squashed,
              float *by_gates, float *by_driven, const float *wanted, size wanted_row)
{
    EACH {
        v8 asked = AT(later, n, 0), keep = AT(gates, 2 * n, 0), take = AT(gates, 2 * n, n);
        v8 drive = AT(driven, n, 0), old = AT(squashed, n, 0), one = asked * take, kept = asked * keep;
        PUT(by_gates, 2 * n, 0, asked * old * (keep - keep * keep));
        PUT(by_gates, 2 * n, n, asked * drive * (take - take * take));
        PUT(by_driven, n, 0, one - one * drive * drive);
        PUT(later, n, 0, kept - kept * old * old + AT(wanted, wanted_row, 0));
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

/* Tiles that stay in sixteen registers: with all loops over one unrolled, its numbers never see memory. */
enum { TALL = 6, HIGH = 4, BROAD = 3 };
#define UNROLLED(i, count) _Pragma("GCC unroll 6") for (int i = 0; i < (count); i++)

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
