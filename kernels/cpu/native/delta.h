// The gated delta rule (kernels/states.py, Delta): each value head of each sequence by one thread, its tokens one piece after another.
//
//   a piece of tokens  convolution, silu and lengths of the head's queries, keys and values, in float32
//   the rule           (delta_rule.h)
//   the piece again    norm and gate
//
// What the convolution keeps is written at last: heads that share a key read it before. Sums are those of a sequence alone, whatever
// its company; where a prompt is cut, pieces end, so that last bits move.
#pragma once
#include "delta_rule.h"
#include "pool.h"

namespace appliance {
namespace ISA {

constexpr int64_t kKeptChannels = 1024;  // at a time, of what the convolution keeps

// Row `t` of a sequence as the convolution sees it, n channels of it from `channel` on; rows before the first are what was kept.
template <Type T> INLINE F seen(const DeltaArgs& a, const float* kept, int64_t first, int64_t t, int64_t channel, int64_t n) {
    if (t >= 0) return load_some<T>(static_cast<const typename As<T>::Item*>(a.x) + (first + t) * a.stride + channel, n);
    if (kept == nullptr) return splat(0);
    return load_some<Type::f32>(kept + (a.rule->kernel - 1 + t) * a.rule->channels() + channel, n);
}

// silu of the convolution at tokens `from` .. `from + count - 1`, [count][width], `size` channels of it from `channel` on.
template <Type T> INLINE void convolve(const DeltaHead& h, int64_t from, int64_t count, int64_t channel, int64_t size, float* out, int64_t width) {
    const DeltaRule& r = *h.a->rule;
    float *rows = h.window, *taps = rows + (kPieceTokens + r.kernel - 1) * 16;
    for (int64_t c = 0; c < size; c += 16, out += 16) {
        for (int64_t j = 0; j < r.kernel; ++j) store(taps + j * 16, load_some<Type::f32>(r.conv + j * r.channels() + channel + c, size - c));
        for (int64_t i = 0; i < count + r.kernel - 1; ++i) store(rows + i * 16, seen<T>(*h.a, h.kept, h.first, from + i - r.kernel + 1, channel + c, size - c));
        for (int64_t i = 0; i < count; ++i) {
            F sum = splat(0);
            for (int64_t j = 0; j < r.kernel; ++j) sum = fma(load(taps + j * 16), load(rows + (i + j) * 16), sum);
            store(out + i * width, silu(sum));  // 0 beyond the last channel
        }
    }
}

// x divided by its length, times `factor`; 0 beyond the last of n.
INLINE void shorten(float* x, int64_t n, float factor) {
    F squares = splat(0);
    for (int64_t i = 0; i < n; i += 16) squares = fma(load(x + i), load(x + i), squares);
    const F scale = splat(factor / std::sqrt(reduce_add(squares) + 1e-6f));
    for (int64_t i = 0; i < n; i += 16) store(x + i, load(x + i) * scale);
}

// Everything that tokens `from` .. `from + count - 1` bring with them.
template <Type T> INLINE void bring(DeltaHead& h, int64_t from, int64_t count) {
    const DeltaRule& r = *h.a->rule;
    const int64_t key = h.head / (r.value_heads / r.key_heads) * r.key_dim, keys = r.key_heads * r.key_dim;
    const float shorter = 1.0f / std::sqrt(float(r.key_dim));
    convolve<T>(h, from, count, key, r.key_dim, h.q, h.key_width);
    convolve<T>(h, from, count, keys + key, r.key_dim, h.k, h.key_width);
    convolve<T>(h, from, count, 2 * keys + h.head * r.value_dim, r.value_dim, h.v, h.value_width);
    for (int64_t i = 0; i < count; ++i) {
        shorten(h.q + i * h.key_width, h.key_width, shorter);
        shorten(h.k + i * h.key_width, h.key_width, 1.0f);
        const auto* gates = static_cast<const typename As<T>::Item*>(h.a->gates) + (h.first + from + i) * h.a->gates_stride;
        float b, a;
        store_some<Type::f32>(&b, load_some<T>(gates + h.head, 1), 1);
        store_some<Type::f32>(&a, load_some<T>(gates + r.value_heads + h.head, 1), 1);
        a += r.dt_bias[h.head];
        h.beta[i] = 1.0f / (1.0f + __builtin_expf(-b));
        h.decay[i] = __builtin_expf(-r.rate[h.head] * (a > 20.0f ? a : __builtin_log1pf(__builtin_expf(a))));
    }
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
    for (int64_t from = 0; from < h.tokens; from += kPieceTokens) {
        const int64_t count = h.tokens - from < kPieceTokens ? h.tokens - from : kPieceTokens;
        bring<T>(h, from, count);
        recur(h, count);
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
