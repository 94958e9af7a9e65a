// The gated delta rule itself, in float32, for a piece of one head's tokens of which all is known but what the state makes of them.
//
//   few tokens   one after another: a row of the state is read and written once a token, in which it is forgotten, changed, asked by
//                this token's query and by the next one's key
//   many         all at once. With S the state before the piece, f(i, j) what is left of token j's change when token i has come, and
//                f(i) the same of S, token i changes the state by
//                    u_i = beta_i (v_i - f(i) k_i S - sum over j < i of f(i, j) (k_i k_j) u_j)
//                and finds f(i) q_i S + sum over j <= i of f(i, j) (q_i k_j) u_j. Behind the last one, l, the state is
//                    f(l) S + sum of f(l, j) k_j u_j
//                That is as much arithmetic but for what forgets, and the state is read once for each tile of tokens, written once.
//
// f are products of what each token leaves, none of which is above 1. What comes later is never multiplied, not even with zero.
#pragma once
#include "convert.h"
#include "transpose.h"

namespace appliance {
namespace ISA {

constexpr int64_t kPieceTokens = 16;                // so many are one vector
constexpr int64_t kManyTokens = 4;                  // from so many on they go all at once
constexpr int kStateVectors = kBytes == 64 ? 4 : 2; // of columns at a time, token by token
constexpr int kTileTokens = kBytes == 64 ? 4 : 2;   // of which keys and queries meet the state at a time
constexpr int kTileVectors = kBytes == 64 ? 2 : 1;  // ... in so many vectors of columns
static_assert(kPieceTokens % kTileTokens == 0);

// One value head of one sequence, and memory for a piece of its tokens.
struct DeltaHead {
    const DeltaArgs* a;
    int64_t sequence, head, first, tokens;  // rows of the sequence
    const float* kept;                      // [kernel - 1, channels]; null: nothing was before
    float* state;                           // [key_dim, value_dim]
    int64_t key_width, value_width;         // whole vectors
    float *q, *k, *v, *out;                 // [kPieceTokens][width]; many tokens leave their changes in v
    float decay[kPieceTokens], beta[kPieceTokens];
    // Of many tokens: keys [key_width][kPieceTokens]; f(i, j) times beta_i (k_i k_j), and times (q_i k_j), [i][j]; f(i); f(l, j).
    float *keys, *changed, *asked;
    float left[kPieceTokens], remains[kPieceTokens];
    float* window;  // [kPieceTokens + kernel - 1][16] of what the convolution sees, and [kernel][16] of its weights

    static INLINE int64_t floats(const DeltaRule& r) {
        return kPieceTokens * (3 * padded(r.key_dim) + 2 * padded(r.value_dim) + 2 * kPieceTokens) + 16 * (kPieceTokens + 2 * r.kernel - 1);
    }
    static INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

    INLINE DeltaHead(const DeltaArgs& args, int64_t item, float* memory) : a(&args), sequence(item / args.rule->value_heads), head(item % args.rule->value_heads) {
        const DeltaRule& r = *a->rule;
        const int64_t place = a->places[sequence];
        first = a->starts[sequence];
        tokens = a->starts[sequence + 1] - first;
        const bool fresh = a->lengths[sequence] == tokens;
        kept = fresh ? nullptr : a->conv + place * a->conv_stride;
        state = a->state + place * a->state_stride + head * r.key_dim * r.value_dim;
        if (fresh) std::memset(state, 0, size_t(r.key_dim * r.value_dim) * 4);
        key_width = padded(r.key_dim);
        value_width = padded(r.value_dim);
        q = memory;
        k = q + kPieceTokens * key_width;
        v = k + kPieceTokens * key_width;
        out = v + kPieceTokens * value_width;
        keys = out + kPieceTokens * value_width;
        changed = keys + kPieceTokens * key_width;
        asked = changed + kPieceTokens * kPieceTokens;
        window = asked + kPieceTokens * kPieceTokens;
    }
};

// One token in `V` vectors of columns, of which the last has n lanes: `recalled` is what its key finds in the state, and becomes what
// the next one's does.
template <int V, bool kNext> INLINE void step(const DeltaHead& h, int64_t i, float* state, int64_t column, int64_t n, F* recalled) {
    const DeltaRule& r = *h.a->rule;
    const float *q = h.q + i * h.key_width, *k = h.k + i * h.key_width, *next = k + h.key_width;
    const F decay = splat(h.decay[i]), beta = splat(h.beta[i]);
    F change[V], out[V];
    for (int j = 0; j < V; ++j) {
        change[j] = (load(h.v + i * h.value_width + column + 16 * j) - decay * recalled[j]) * beta;
        out[j] = recalled[j] = splat(0);
    }
    for (int64_t d = 0; d < r.key_dim; ++d, state += r.value_dim)
        for (int j = 0; j < V; ++j) {
            const F row = fma(splat(k[d]), change[j], decay * load_some<Type::f32>(state + 16 * j, n - 16 * j));
            store_some<Type::f32>(state + 16 * j, row, n - 16 * j);
            out[j] = fma(splat(q[d]), row, out[j]);
            if constexpr (kNext) recalled[j] = fma(splat(next[d]), row, recalled[j]);
        }
    for (int j = 0; j < V; ++j) store(h.out + i * h.value_width + column + 16 * j, out[j]);
}

template <int V> INLINE void sweep(const DeltaHead& h, int64_t count, int64_t column, int64_t n) {
    const DeltaRule& r = *h.a->rule;
    float* state = h.state + column;
    F recalled[V];
    for (int j = 0; j < V; ++j) recalled[j] = splat(0);
    for (int64_t d = 0; d < r.key_dim; ++d)
        for (int j = 0; j < V; ++j) recalled[j] = fma(splat(h.k[d]), load_some<Type::f32>(state + d * r.value_dim + 16 * j, n - 16 * j), recalled[j]);
    for (int64_t i = 0; i + 1 < count; ++i) step<V, true>(h, i, state, column, n, recalled);
    step<V, false>(h, count - 1, state, column, n, recalled);
}

// What many tokens have to do with each other. Rows behind the last of `count` tokens become such as change nothing.
INLINE void meet(DeltaHead& h, int64_t count) {
    for (int64_t i = count; i < kPieceTokens; ++i) {
        std::memset(h.q + i * h.key_width, 0, size_t(h.key_width) * 4);
        std::memset(h.k + i * h.key_width, 0, size_t(h.key_width) * 4);
        std::memset(h.v + i * h.value_width, 0, size_t(h.value_width) * 4);
        h.decay[i] = 1;
        h.beta[i] = 0;
    }
    for (int64_t d = 0; d < h.key_width; d += 16) {
        I rows[kPieceTokens];
        for (int64_t i = 0; i < kPieceTokens; ++i) rows[i] = iload(h.k + i * h.key_width + d);
        transpose(rows, h.keys + d * kPieceTokens, kPieceTokens * 4);
    }
    alignas(64) static constexpr float kLanes[kPieceTokens] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    F rest = splat(0);  // f(i, j) in lane j
    float left = 1;
    for (int64_t i = 0; i < count; i += kTileTokens) {
        const float *q = h.q + i * h.key_width, *k = h.k + i * h.key_width;
        F keys[kTileTokens], queries[kTileTokens];
        for (int t = 0; t < kTileTokens; ++t) keys[t] = queries[t] = splat(0);
        for (int64_t d = 0; d < h.a->rule->key_dim; ++d) {
            const F each = load(h.keys + d * kPieceTokens);
            for (int t = 0; t < kTileTokens; ++t) {
                keys[t] = fma(splat(k[t * h.key_width + d]), each, keys[t]);
                queries[t] = fma(splat(q[t * h.key_width + d]), each, queries[t]);
            }
        }
        for (int t = 0; t < kTileTokens; ++t) {
            rest = select(equal(load(kLanes), splat(float(i + t))), splat(1), rest * splat(h.decay[i + t]));
            store(h.changed + (i + t) * kPieceTokens, rest * keys[t] * splat(h.beta[i + t]));
            store(h.asked + (i + t) * kPieceTokens, rest * queries[t]);
            h.left[i + t] = left *= h.decay[i + t];
        }
    }
    store(h.remains, rest);
}

// A tile of tokens from `i` on in V vectors of columns: their changes into v, what they find into out. Tiles before have been here.
template <int V, bool kWhole> INLINE void find(const DeltaHead& h, int64_t i, const float* state, int64_t column, int64_t n) {
    const DeltaRule& r = *h.a->rule;
    const float *q = h.q + i * h.key_width, *k = h.k + i * h.key_width;
    F change[kTileTokens][V], out[kTileTokens][V];
    for (int t = 0; t < kTileTokens; ++t)
        for (int j = 0; j < V; ++j) change[t][j] = out[t][j] = splat(0);
    for (int64_t d = 0; d < r.key_dim; ++d, state += r.value_dim) {
        F row[V];
        for (int j = 0; j < V; ++j) row[j] = kWhole ? load(state + 16 * j) : load_some<Type::f32>(state + 16 * j, n);
        for (int t = 0; t < kTileTokens; ++t)
            for (int j = 0; j < V; ++j) {
                change[t][j] = fma(splat(k[t * h.key_width + d]), row[j], change[t][j]);
                out[t][j] = fma(splat(q[t * h.key_width + d]), row[j], out[t][j]);
            }
    }
    for (int t = 0; t < kTileTokens; ++t)
        for (int j = 0; j < V; ++j) {
            const F left = splat(h.left[i + t]), v = load(h.v + (i + t) * h.value_width + column + 16 * j);
            change[t][j] = (v - left * change[t][j]) * splat(h.beta[i + t]);
            out[t][j] = left * out[t][j];
        }
    const float *changed = h.changed + i * kPieceTokens, *asked = h.asked + i * kPieceTokens;
    for (int64_t s = 0; s < i; ++s)
        for (int j = 0; j < V; ++j) {
            const F before = load(h.v + s * h.value_width + column + 16 * j);
            for (int t = 0; t < kTileTokens; ++t) {
                change[t][j] = change[t][j] - splat(changed[t * kPieceTokens + s]) * before;
                out[t][j] = fma(splat(asked[t * kPieceTokens + s]), before, out[t][j]);
            }
        }
    for (int t = 0; t < kTileTokens; ++t)
        for (int j = 0; j < V; ++j) {
            for (int s = 0; s < t; ++s) change[t][j] = change[t][j] - splat(changed[t * kPieceTokens + i + s]) * change[s][j];
            for (int s = 0; s <= t; ++s) out[t][j] = fma(splat(asked[t * kPieceTokens + i + s]), change[s][j], out[t][j]);
            store(h.v + (i + t) * h.value_width + column + 16 * j, change[t][j]);
            store(h.out + (i + t) * h.value_width + column + 16 * j, out[t][j]);
        }
}

// R rows of the state from `d` on, behind the piece.
template <int R, int V, bool kWhole> INLINE void change(const DeltaHead& h, int64_t count, int64_t d, float* state, int64_t column, int64_t n) {
    const int64_t width = h.a->rule->value_dim;
    const F left = splat(h.left[count - 1]);
    F rows[R][V];
    for (int t = 0; t < R; ++t)
        for (int j = 0; j < V; ++j) rows[t][j] = left * (kWhole ? load(state + t * width + 16 * j) : load_some<Type::f32>(state + t * width + 16 * j, n));
    for (int64_t s = 0; s < count; ++s)
        for (int j = 0; j < V; ++j) {
            const F one = load(h.v + s * h.value_width + column + 16 * j);
            for (int t = 0; t < R; ++t) rows[t][j] = fma(splat(h.k[s * h.key_width + d + t]), one, rows[t][j]);
        }
    for (int t = 0; t < R; ++t)
        for (int j = 0; j < V; ++j) {
            if (kWhole) store(state + t * width + 16 * j, rows[t][j]);
            else store_some<Type::f32>(state + t * width + 16 * j, rows[t][j], n);
        }
}

template <int V, bool kWhole> INLINE void all_at_once(const DeltaHead& h, int64_t count, int64_t column, int64_t n) {
    constexpr int kRows = 2 * kTileTokens;
    const DeltaRule& r = *h.a->rule;
    float* state = h.state + column;
    for (int64_t i = 0; i < count; i += kTileTokens) find<V, kWhole>(h, i, state, column, n);
    for (int64_t s = 0; s < count; ++s)
        for (int j = 0; j < V; ++j) {
            float* one = h.v + s * h.value_width + column + 16 * j;
            store(one, load(one) * splat(h.remains[s]));
        }
    int64_t d = 0;
    for (; d + kRows <= r.key_dim; d += kRows) change<kRows, V, kWhole>(h, count, d, state + d * r.value_dim, column, n);
    for (; d < r.key_dim; ++d) change<1, V, kWhole>(h, count, d, state + d * r.value_dim, column, n);
}

// The piece in all columns: of q, k, v, decay and beta, which it may change, out is made, and the state.
inline void recur(DeltaHead& h, int64_t count) {
    constexpr int64_t kColumns = 16 * kStateVectors, kTile = 16 * kTileVectors;
    const int64_t columns = h.a->rule->value_dim;
    int64_t c = 0;
    if (count < kManyTokens) {
        for (; c + kColumns <= columns; c += kColumns) sweep<kStateVectors>(h, count, c, kColumns);
        for (; c < columns; c += 16) sweep<1>(h, count, c, columns - c);
        return;
    }
    meet(h, count);
    for (; c + kTile <= columns; c += kTile) all_at_once<kTileVectors, true>(h, count, c, kTile);
    for (; c < columns; c += 16) all_at_once<1, false>(h, count, c, columns - c);
}

}  // namespace ISA
}  // namespace appliance
