// The gated delta rule (kernels/states.py, Delta): each value head of each sequence by one thread, its tokens one after another.
//
//   a piece of tokens    convolution, silu and lengths of the head's queries, keys and values, in float32
//   columns of the state as many as registers hold, over all tokens of the piece: what lies in the first cache is read and written
//                        once a token, in which a row is forgotten, changed, asked by this token's query and by the next one's key
//   the piece again      norm and gate
//
// What the convolution keeps is written at last: heads that share a key read it before. Sums go row by row, however a prompt is cut
// into pieces and steps: results are the same to the last bit.
#pragma once
#include "convert.h"
#include "pool.h"

namespace appliance {
namespace ISA {

constexpr int64_t kPieceTokens = 32;
constexpr int kStateVectors = kBytes == 64 ? 4 : 2;  // of columns at a time
constexpr int64_t kKeptChannels = 1024;              // at a time, of what the convolution keeps

// One value head of one sequence, and memory for a piece of its tokens.
struct DeltaHead {
    const DeltaArgs* a;
    int64_t sequence, head, first, tokens;  // rows of the sequence
    const float* kept;                      // [kernel - 1, channels]; null: nothing was before
    float* state;                           // [key_dim, value_dim]
    int64_t key_width, value_width;         // whole vectors
    float *q, *k, *v, *out;                 // [kPieceTokens][width]
    float decay[kPieceTokens], beta[kPieceTokens];

    static INLINE int64_t floats(const DeltaRule& r) { return 2 * kPieceTokens * (padded(r.key_dim) + padded(r.value_dim)); }
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
    }
};

// Row `t` of a sequence as the convolution sees it, n channels of it from `channel` on; rows before the first are what was kept.
template <Type T> INLINE F seen(const DeltaArgs& a, const float* kept, int64_t first, int64_t t, int64_t channel, int64_t n) {
    if (t >= 0) return load_some<T>(static_cast<const typename As<T>::Item*>(a.x) + (first + t) * a.stride + channel, n);
    if (kept == nullptr) return splat(0);
    return load_some<Type::f32>(kept + (a.rule->kernel - 1 + t) * a.rule->channels() + channel, n);
}

// silu of the convolution at token t, [count] from `channel` on; returns the sum of squares.
template <Type T> INLINE float convolve(const DeltaHead& h, int64_t t, int64_t channel, int64_t count, float* out) {
    const DeltaRule& r = *h.a->rule;
    F squares = splat(0);
    for (int64_t c = 0; c < count; c += 16) {
        F sum = splat(0);
        for (int64_t j = 0; j < r.kernel; ++j) {
            const F tap = load_some<Type::f32>(r.conv + j * r.channels() + channel + c, count - c);
            sum = fma(tap, seen<T>(*h.a, h.kept, h.first, t - r.kernel + 1 + j, channel + c, count - c), sum);
        }
        sum = silu(sum);  // 0 beyond the last channel
        squares = fma(sum, sum, squares);
        store(out + c, sum);
    }
    return reduce_add(squares);
}

INLINE void scale(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += 16) store(x + i, load(x + i) * splat(factor));
}

// Everything that tokens `from` .. `from + count - 1` bring with them.
template <Type T> INLINE void bring(DeltaHead& h, int64_t from, int64_t count) {
    const DeltaRule& r = *h.a->rule;
    const int64_t key = h.head / (r.value_heads / r.key_heads) * r.key_dim, keys = r.key_heads * r.key_dim;
    const float shorter = 1.0f / std::sqrt(float(r.key_dim));
    for (int64_t i = 0; i < count; ++i) {
        float *q = h.q + i * h.key_width, *k = h.k + i * h.key_width;
        scale(q, h.key_width, shorter / std::sqrt(convolve<T>(h, from + i, key, r.key_dim, q) + 1e-6f));
        scale(k, h.key_width, 1.0f / std::sqrt(convolve<T>(h, from + i, keys + key, r.key_dim, k) + 1e-6f));
        convolve<T>(h, from + i, 2 * keys + h.head * r.value_dim, r.value_dim, h.v + i * h.value_width);
        const auto* gates = static_cast<const typename As<T>::Item*>(h.a->gates) + (h.first + from + i) * h.a->gates_stride;
        float b, a;
        store_some<Type::f32>(&b, load_some<T>(gates + h.head, 1), 1);
        store_some<Type::f32>(&a, load_some<T>(gates + r.value_heads + h.head, 1), 1);
        a += r.dt_bias[h.head];
        h.beta[i] = 1.0f / (1.0f + __builtin_expf(-b));
        h.decay[i] = __builtin_expf(-r.rate[h.head] * (a > 20.0f ? a : __builtin_log1pf(__builtin_expf(a))));
    }
}

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

template <Type T> INLINE void finish_piece(const DeltaHead& h, int64_t from, int64_t count) {
    using Item = typename As<T>::Item;
    const DeltaRule& r = *h.a->rule;
    for (int64_t i = 0; i < count; ++i) {
        const float* x = h.out + i * h.value_width;
        const int64_t row = h.first + from + i;
        const Item* z = static_cast<const Item*>(h.a->x) + row * h.a->stride + r.channels() + h.head * r.value_dim;
        Item* out = static_cast<Item*>(h.a->out) + row * r.values() + h.head * r.value_dim;
        F squares = splat(0);  // lanes beyond the last column are 0
        for (int64_t c = 0; c < r.value_dim; c += 16) squares = fma(load(x + c), load(x + c), squares);
        const F factor = splat(1.0f / std::sqrt(reduce_add(squares) / float(r.value_dim) + r.eps));
        for (int64_t c = 0; c < r.value_dim; c += 16) {
            const int64_t n = r.value_dim - c;
            store_some<T>(out + c, load(x + c) * factor * load_some<Type::f32>(r.norm + c, n) * silu(load_some<T>(z + c, n)), n);
        }
    }
}

template <Type T> INLINE void run_head(DeltaHead h) {
    constexpr int64_t kColumns = 16 * kStateVectors;
    const int64_t columns = h.a->rule->value_dim;
    for (int64_t from = 0; from < h.tokens; from += kPieceTokens) {
        const int64_t count = h.tokens - from < kPieceTokens ? h.tokens - from : kPieceTokens;
        bring<T>(h, from, count);
        int64_t c = 0;
        for (; c + kColumns <= columns; c += kColumns) sweep<kStateVectors>(h, count, c, kColumns);
        for (; c < columns; c += 16) sweep<1>(h, count, c, columns - c);
        finish_piece<T>(h, from, count);
    }
}

// What the convolution of the next token will see of a sequence, in some channels: the oldest row first, so that none is read after
// another took its place.
template <Type T> INLINE void keep(const DeltaArgs& a, int64_t sequence, int64_t channel, int64_t count) {
    const int64_t first = a.starts[sequence], tokens = a.starts[sequence + 1] - first, before = a.rule->kernel - 1;
    if (tokens == 0) return;
    float* kept = a.conv + a.places[sequence] * a.conv_stride;
    const float* old = a.lengths[sequence] == tokens ? nullptr : kept;
    for (int64_t j = 0; j < before; ++j)
        for (int64_t c = channel; c < channel + count; c += 16)
            store_some<Type::f32>(kept + j * a.rule->channels() + c, seen<T>(a, old, first, tokens - before + j, c, channel + count - c), channel + count - c);
}

inline void delta(Pool& pool, const DeltaArgs& a) {
    const DeltaRule& r = *a.rule;
    const size_t bytes = size_t(DeltaHead::floats(r)) * 4;
    const int64_t parts = (r.channels() + kKeptChannels - 1) / kKeptChannels;
    pool.reset(a.sequences * r.value_heads);
    pool.run([&](int thread) {
        float* memory = reinterpret_cast<float*>(pool.scratch(thread, bytes));
        with_type(a.type, [&](auto tag) {
            constexpr Type T = decltype(tag)::value;
            for (int64_t item; pool.next(thread, item);) run_head<T>(DeltaHead(a, item, memory));
            pool.barrier();
            for (int64_t i = thread; i < a.sequences * parts; i += pool.size()) {
                const int64_t channel = i % parts * kKeptChannels, left = r.channels() - channel;
                keep<T>(a, i / parts, channel, left < kKeptChannels ? left : kKeptChannels);
            }
        });
    });
}

}  // namespace ISA
}  // namespace appliance
