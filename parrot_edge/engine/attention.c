/* Attention of new tokens over their caches, on CPUs with AVX2 or AVX-512.

   llama.cpp's own goes through the cache once for every query head, a position at a time, and adds
   values up in half precision. Here the query heads that share keys and values (grouped-query attention,
   arXiv 2305.13245) go through them together, many positions at a time, and all sums are float32. The
   softmax is kept up block by block, as FlashAttention has it (arXiv 2205.14135).

   It knows nothing of models: it is told of each node of ggml's graphs, and takes over those it can compute. */

#include <ggml.h>
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16 /* floats in a vector */
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#define LANES 8
#else
#error "needs AVX2 with F16C and FMA, or AVX-512"
#endif

#define ROWS 4       /* query rows that go through the cache together, at most */
#define CHUNK 2      /* vectors of a head that are held in registers for each row */
#define BLOCK 64     /* positions between two looks at the softmax; llama.cpp pads its caches to 256 */
#define MAX_HEAD 256 /* numbers in a head, at most */

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half;

static const half MASKED = 0xfc00; /* minus infinity */

INLINE vector widen(const half *from) {
#if LANES == 16
    return (vector) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) from));
#else
    return (vector) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from));
#endif
}

INLINE vector load(const float *from) { return *(const vector *) from; }

INLINE void store(float *to, vector numbers) { *(vector *) to = numbers; }

INLINE vector fill(float number) { return number - (vector) {0}; }

INLINE vector larger(vector a, vector b) {
#if LANES == 16
    return (vector) _mm512_max_ps((__m512) a, (__m512) b);
#else
    return (vector) _mm256_max_ps((__m256) a, (__m256) b);
#endif
}

INLINE float largest(vector numbers) {
    float most = numbers[0];
    for (int i = 1; i < LANES; i++) most = numbers[i] > most ? numbers[i] : most;
    return most;
}

INLINE float sum(vector numbers) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += numbers[i];
    return total;
}

/* The sum of each of LANES vectors. */
INLINE vector sum_each(const vector *v) {
#if LANES == 16
    __m512 quarters[4]; /* of each four vectors: their sums within the four 128-bit parts */
    for (int i = 0; i < 4; i++) {
        __m512 a = (__m512) v[4 * i], b = (__m512) v[4 * i + 1], c = (__m512) v[4 * i + 2], d = (__m512) v[4 * i + 3];
        __m512d ab = (__m512d) _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512d cd = (__m512d) _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        quarters[i] = _mm512_add_ps((__m512) _mm512_unpacklo_pd(ab, cd), (__m512) _mm512_unpackhi_pd(ab, cd));
    }
    __m512 halves[2];
    for (int i = 0; i < 2; i++) {
        __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return (vector) _mm512_add_ps(
        _mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
#else
    __m256 halves[2]; /* of each four vectors: their sums within the two 128-bit parts */
    for (int i = 0; i < 2; i++) {
        __m256 ab = _mm256_hadd_ps((__m256) v[4 * i], (__m256) v[4 * i + 1]);
        __m256 cd = _mm256_hadd_ps((__m256) v[4 * i + 2], (__m256) v[4 * i + 3]);
        halves[i] = _mm256_hadd_ps(ab, cd);
    }
    return (vector) _mm256_add_ps(
        _mm256_permute2f128_ps(halves[0], halves[1], 0x20), _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
#endif
}

/* e^x for x <= 0, within 2e-7 of it; 1e-38 below -87. A polynomial of x less its whole powers of two, with the
   coefficients of Cephes' expf. */
INLINE vector exponential(vector x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    x = larger(x, fill(-87.3f));
    vector rounded = x * 1.44269504f + shift;
    vector power = rounded - shift;
    vector rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    vector y = fill(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return (vector) ((integers) y + (((integers) rounded - (integers) fill(shift)) << 23));
}

/* What ggml keeps with a custom operation (its ggml_custom_op_params), and the scale behind it. */
struct operation {
    ggml_custom_op_t compute;
    int tasks;
    void *nothing;
    float scale;
};

/* Query rows of one sequence that share keys and values.

   positions      of the cache
   keys, values   of the first position, and the bytes from one position to the next
   masks          (rows, positions): what is added to the scores
   queries, outputs  (rows, numbers in a head) */
struct work {
    int64_t positions;
    const char *keys, *values;
    size_t key_step, value_step;
    const half *masks[ROWS];
    const float *queries[ROWS];
    float *outputs[ROWS];
};

INLINE bool sees_any(const struct work *work, const int rows, int64_t from) {
    unsigned seen = 0;
    for (int r = 0; r < rows; r++) {
        if (r > 0 && work->masks[r] == work->masks[r - 1]) continue;
        for (int i = 0; i < BLOCK; i++) seen |= work->masks[r][from + i] ^ MASKED;
    }
    return seen != 0;
}

INLINE void fetch(const char *from, int64_t size) {
    for (int64_t byte = 0; byte < 2 * size; byte += 64) __builtin_prefetch(from + byte);
}

/* What a pass over the cache keeps of each row: the query, scaled; the values so far, weighted; the largest score so far;
   the sum of the weights, which are e to the score less that one; and the scores of a block, then its weights. */
struct state {
    float query[ROWS][MAX_HEAD], total[ROWS][MAX_HEAD], weight[ROWS][BLOCK];
    float most[ROWS], sum[ROWS];
} __attribute__((aligned(64)));

/* Products of a block's keys with the queries, and what the masks add; fetches the values of the block meanwhile. */
INLINE void score(struct state *state, const struct work *work, const int rows, const int64_t size, int64_t block) {
    const char *keys = work->keys + block * work->key_step, *values = work->values + block * work->value_step;
    for (int p = 0; p < BLOCK; p += LANES) {
        vector products[ROWS][LANES];
        for (int i = 0; i < LANES; i++) {
            const half *key = (const half *) (keys + (p + i) * work->key_step);
            fetch(values + (p + i) * work->value_step, size);
            vector dot[ROWS];
            for (int r = 0; r < rows; r++) dot[r] = fill(0);
            for (int64_t d = 0; d < size; d += LANES) {
                vector numbers = widen(key + d);
                for (int r = 0; r < rows; r++) dot[r] += numbers * load(state->query[r] + d);
            }
            for (int r = 0; r < rows; r++) products[r][i] = dot[r];
        }
        for (int r = 0; r < rows; r++)
            store(state->weight[r] + p, sum_each(products[r]) + widen(work->masks[r] + block + p));
    }
}

/* Makes weights of a row's scores, and brings what came before down to the largest of them. */
INLINE void weigh(struct state *state, int row, const int64_t size) {
    float *weights = state->weight[row], *total = state->total[row];
    vector highest = load(weights);
    for (int p = LANES; p < BLOCK; p += LANES) highest = larger(highest, load(weights + p));
    const float high = largest(highest);
    if (high > state->most[row]) {
        const float shrink = expf(state->most[row] - high);
        state->most[row] = high;
        state->sum[row] *= shrink;
        for (int64_t d = 0; d < size; d += LANES) store(total + d, load(total + d) * shrink);
    }
    const float most = state->most[row];
    vector added = fill(0);
    for (int p = 0; p < BLOCK; p += LANES) {
        vector weight = most == -INFINITY ? fill(0) : exponential(load(weights + p) - most);
        store(weights + p, weight);
        added += weight;
    }
    state->sum[row] += sum(added);
}

/* Adds a block's values up by their weights; fetches the keys of the next block meanwhile. */
INLINE void add(struct state *state, const struct work *work, const int rows, const int64_t size, int64_t block) {
    const char *values = work->values + block * work->value_step, *next = work->keys + (block + BLOCK) * work->key_step;
    for (int64_t d = 0; d < size; d += CHUNK * LANES) {
        vector held[ROWS][CHUNK];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < CHUNK; c++) held[r][c] = load(state->total[r] + d + c * LANES);
        for (int p = 0; p < BLOCK; p++) {
            const half *value = (const half *) (values + p * work->value_step) + d;
            if (d == 0) fetch(next + p * work->key_step, size);
            for (int c = 0; c < CHUNK; c++) {
                vector numbers = widen(value + c * LANES);
                for (int r = 0; r < rows; r++) held[r][c] += numbers * state->weight[r][p];
            }
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < CHUNK; c++) store(state->total[r] + d + c * LANES, held[r][c]);
    }
}

INLINE void attend(const struct work *work, const int rows, const int64_t size, float scale) {
    struct state state;
    for (int r = 0; r < rows; r++) {
        for (int64_t d = 0; d < size; d++) state.query[r][d] = scale * work->queries[r][d];
        memset(state.total[r], 0, size * sizeof(float));
        state.most[r] = -INFINITY;
        state.sum[r] = 0;
    }
    for (int64_t block = 0; block < work->positions; block += BLOCK) {
        if (!sees_any(work, rows, block)) continue;
        score(&state, work, rows, size, block);
        for (int r = 0; r < rows; r++) weigh(&state, r, size);
        add(&state, work, rows, size, block);
    }
    for (int r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d++)
            work->outputs[r][d] = state.sum[r] > 0 ? state.total[r][d] / state.sum[r] : 0;
}

/* The number of rows becomes a constant, which keeps their sums in registers. */
INLINE void attend_rows(const struct work *work, int rows, const int64_t size, float scale) {
    switch (rows) {
        case 1: attend(work, 1, size, scale); break;
        case 2: attend(work, 2, size, scale); break;
        case 3: attend(work, 3, size, scale); break;
        case 4: attend(work, 4, size, scale); break;
    }
}

/* One thread's part of a node: q float32 (size, tokens, heads, sequences), k and v float16 (size, positions,
   key heads, sequences), mask float16 (positions, tokens, 1, sequences), out float32 (size, heads, tokens, sequences). */
static void compute(struct ggml_tensor *out, int thread, int threads, void *nothing) {
    (void) nothing;
    const struct ggml_tensor *q = out->src[0], *k = out->src[1], *v = out->src[2], *mask = out->src[3];
    struct operation operation;
    memcpy(&operation, out->op_params, sizeof operation);
    const int64_t size = q->ne[0], group = q->ne[2] / k->ne[2], rows = q->ne[1] * group;
    const int64_t caches = q->ne[3] * k->ne[2]; /* each with rows of its own */
    const int most = caches * ((rows + ROWS - 1) / ROWS) < threads ? 1 : ROWS; /* so that none stands idle */
    const int64_t parts = (rows + most - 1) / most;
    for (int64_t unit = thread; unit < caches * parts; unit += threads) {
        const int64_t first = unit % parts * most, head = unit / parts % k->ne[2], sequence = unit / parts / k->ne[2];
        const int count = rows - first < most ? rows - first : most;
        struct work work = {
            .positions = k->ne[1],
            .keys = (const char *) k->data + head * k->nb[2] + sequence * k->nb[3],
            .values = (const char *) v->data + head * v->nb[2] + sequence * v->nb[3],
            .key_step = k->nb[1],
            .value_step = v->nb[1],
        };
        for (int r = 0; r < count; r++) {
            const int64_t token = (first + r) / group, row = head * group + (first + r) % group;
            work.queries[r] = (const float *) ((const char *) q->data + token * q->nb[1] + row * q->nb[2] + sequence * q->nb[3]);
            work.outputs[r] = (float *) ((char *) out->data + row * out->nb[1] + token * out->nb[2] + sequence * out->nb[3]);
            work.masks[r] = (const half *) ((const char *) mask->data + token * mask->nb[1] + sequence * mask->nb[3]);
        }
        switch (size) { /* what most models have, as a constant */
            case 64: attend_rows(&work, count, 64, operation.scale); break;
            case 128: attend_rows(&work, count, 128, operation.scale); break;
            default: attend_rows(&work, count, size, operation.scale);
        }
    }
}

static bool can_compute(const struct ggml_tensor *node) {
    const struct ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    float parameters[3]; /* scale, bias of ALiBi, cap of the scores */
    memcpy(parameters, node->op_params, sizeof parameters);
    return parameters[1] == 0 && parameters[2] == 0 && node->src[4] == NULL /* attention sinks */
        && q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16
        && mask != NULL && mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->ne[3] == q->ne[3]
        && q->ne[0] == v->ne[0] && q->ne[0] % (CHUNK * LANES) == 0 && q->ne[0] <= MAX_HEAD
        && q->ne[3] == k->ne[3] && k->ne[1] % BLOCK == 0
        && q->nb[0] == sizeof(float) && k->nb[0] == sizeof(half) && v->nb[0] == sizeof(half);
}

/* A ggml_backend_sched_eval_callback. It is asked of every node before a graph is computed, makes those of
   attention that it can compute custom operations, and wants to be shown no result. */
bool take_attention(struct ggml_tensor *node, bool asks, void *nothing) {
    (void) asks, (void) nothing;
    if (node->op == GGML_OP_FLASH_ATTN_EXT && can_compute(node)) {
        struct operation operation = {.compute = compute, .tasks = GGML_N_TASKS_MAX};
        memcpy(&operation.scale, node->op_params, sizeof operation.scale);
        memcpy(node->op_params, &operation, sizeof operation);
        node->op = GGML_OP_CUSTOM;
    }
    return false;
}
