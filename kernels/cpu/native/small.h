// The operations between the products: norms, rotation and cache writes, gates, look-ups, the largest logit.
#pragma once
#include "cache.h"
#include "expand.h"
#include "pool.h"

namespace appliance {
namespace ISA {

// Waking the threads costs about as much as this many bytes of row-wise work.
constexpr int64_t kWorthThreads = 1 << 15;

// f(first, last) on ranges of 0 .. count - 1, by all threads where the work is worth it.
template <class G> INLINE void ranges(Pool& pool, int64_t count, int64_t bytes, G&& g) {
    if (count * bytes < kWorthThreads || pool.size() == 1) return g(0, count);
    pool.run([&](int thread) { g(count * thread / pool.size(), count * (thread + 1) / pool.size()); });
}

// 1 / sqrt(mean(x^2) + eps)
template <Type T> INLINE float norm_factor(const typename As<T>::Item* x, int64_t n, float eps) {
    F squares = splat(0);
    for (int64_t k = 0; k < n; k += 16) {
        const F v = load_some<T>(x + k, n - k);
        squares = fma(v, v, squares);
    }
    return 1.0f / std::sqrt(reduce_add(squares) / float(n) + eps);
}

template <Type T> INLINE void norm_row(const RowsArgs& a, int64_t row) {
    using Item = typename As<T>::Item;
    const int64_t n = a.columns;
    const Item *x = static_cast<const Item*>(a.x) + row * a.stride, *weight = static_cast<const Item*>(a.norm);
    const Item* residual = a.residual == nullptr ? nullptr : static_cast<const Item*>(a.residual) + row * n;
    const F factor = splat(norm_factor<T>(x, n, a.eps)), offset = splat(a.offset);
    for (int64_t k = 0; k < n; k += 16) {
        F y = load_some<T>(x + k, n - k) * factor * (load_some<T>(weight + k, n - k) + offset);
        if (residual != nullptr) y = y + load_some<T>(residual + k, n - k);
        store_some<T>(static_cast<Item*>(a.out) + row * n + k, y, n - k);
    }
}

inline void rms_norm(Pool& pool, const RowsArgs& a) {
    with_type(a.type, [&](auto tag) {
        ranges(pool, a.rows, a.columns * 4, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) norm_row<decltype(tag)::value>(a, r);
        });
    });
}

template <bool kGelu> inline void gate_mul(Pool& pool, const RowsArgs& a) {
    const int64_t half = a.columns / 2;
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        ranges(pool, a.rows, a.columns * 4, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) {
                const Item* x = static_cast<const Item*>(a.x) + r * a.stride;
                Item* out = static_cast<Item*>(a.out) + r * half;
                for (int64_t k = 0; k < half; k += 16)
                    store_some<T>(out + k, gate<kGelu>(load_some<T>(x + k, half - k)) * load_some<T>(x + half + k, half - k), half - k);
            }
        });
    });
}

// residual * sigmoid(x)
inline void sigmoid_mul(Pool& pool, const RowsArgs& a) {
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        ranges(pool, a.rows, a.columns * 4, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) {
                const Item *gate = static_cast<const Item*>(a.x) + r * a.stride, *x = static_cast<const Item*>(a.residual) + r * a.columns;
                for (int64_t k = 0; k < a.columns; k += 16) {
                    const F share = splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - load_some<T>(gate + k, a.columns - k)));
                    store_some<T>(static_cast<Item*>(a.out) + r * a.columns + k, load_some<T>(x + k, a.columns - k) * share, a.columns - k);
                }
            }
        });
    });
}

// gelu(residual) * x
inline void gelu_by(Pool& pool, const RowsArgs& a) {
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        ranges(pool, a.rows, a.columns * 4, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) {
                const Item *x = static_cast<const Item*>(a.x) + r * a.stride, *gates = static_cast<const Item*>(a.residual) + r * a.columns;
                Item* out = static_cast<Item*>(a.out) + r * a.columns;
                for (int64_t k = 0, n = a.columns; k < a.columns; k += 16, n -= 16)
                    store_some<T>(out + k, gate<true>(load_some<T>(gates + k, n)) * load_some<T>(x + k, n), n);
            }
        });
    });
}

// x * norm[0]
inline void scale(Pool& pool, const RowsArgs& a) {
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        const F factor = splat(reduce_add(load_some<T>(static_cast<const Item*>(a.norm), 1)));
        ranges(pool, a.rows, a.columns * 4, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r)
                for (int64_t k = 0, n = a.columns; k < a.columns; k += 16, n -= 16)
                    store_some<T>(static_cast<Item*>(a.out) + r * a.columns + k, load_some<T>(static_cast<const Item*>(a.x) + r * a.stride + k, n) * factor, n);
        });
    });
}

// One head of q or k: normalized, its first `rotary` features rotated, in float32.
template <Type T> INLINE void rotate_head(const typename As<T>::Item* x, const typename As<T>::Item* norm, float eps, float offset, const float* cos_sin, int64_t rotary, int64_t dim, float* out) {
    const F factor = splat(norm != nullptr ? norm_factor<T>(x, dim, eps) : 1.0f), shift = splat(offset);
    for (int64_t k = 0; k < dim; k += 16) {
        F v = load_some<T>(x + k, dim - k);
        if (norm != nullptr) v = v * factor * (load_some<T>(norm + k, dim - k) + shift);
        store_some<Type::f32>(out + k, v, dim - k);
    }
    const int64_t half = rotary / 2;
    for (int64_t k = 0; k < half; k += 16) {
        const int64_t n = half - k;
        const F a = load_some<Type::f32>(out + k, n), b = load_some<Type::f32>(out + half + k, n);
        const F cos = load_some<Type::f32>(cos_sin + k, n), sin = load_some<Type::f32>(cos_sin + half + k, n);
        store_some<Type::f32>(out + k, a * cos - b * sin, n);
        store_some<Type::f32>(out + half + k, b * cos + a * sin, n);
    }
}

// A head of values that was normalized: rounded to T, as an operator would have left it, and as keys had it before `moved` pairs came first.
template <Type T> INLINE void as_values(float* wide, int64_t dim, int64_t moved) {
    alignas(64) float found[kMostFeatures];
    alignas(64) typename As<T>::Item rounded[16];
    for (int64_t k = 0; k < dim; k += 16) {
        store_some<T>(rounded, load_some<Type::f32>(wide + k, dim - k), dim - k);
        store_some<Type::f32>(found + k, load_some<T>(rounded, dim - k), dim - k);
    }
    const int64_t half = dim / 2, rest = half - moved;
    const auto copy = [&](int64_t to, int64_t from, int64_t count) { std::memcpy(wide + to, found + from, size_t(count) * sizeof(float)); };
    copy(0, 0, moved);
    copy(moved, 2 * moved, rest);
    copy(half, moved, moved);
    copy(half + moved, 2 * moved + rest, dim - half - moved);
}

inline void rope_store(Pool& pool, const RopeStoreArgs& a) {
    const Cache& c = a.cache;
    const int64_t heads = a.q_heads + (c.k == c.v ? 1 : 2) * c.heads;  // values that are the keys are not written again
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        // By heads, not tokens: a step may have one token.
        ranges(pool, a.tokens * heads, c.dim * 16, [&](int64_t first, int64_t last) {
            alignas(64) float wide[kMostFeatures];
            for (int64_t i = first; i < last; ++i) {
                const int64_t token = i / heads, head = i % heads;
                const bool query = head < a.q_heads, value = head >= a.q_heads + c.heads;
                // Keys are left as they come, so that values can be made of them.
                Item* x = static_cast<Item*>(a.qkv) + token * a.stride + (value && a.keys_only ? head - c.heads : head) * c.dim;
                const int64_t rotary = value ? 0 : a.rotary;
                const Item* norm = static_cast<const Item*>(value ? a.v_norm : query ? a.q_norm : a.k_norm);
                rotate_head<T>(x, norm, a.eps, a.offset, a.cos_sin + a.positions[token] * a.rotary, rotary, c.dim, wide);
                if (query) {
                    for (int64_t k = 0; k < c.dim; k += 16) store_some<T>(x + k, load_some<Type::f32>(wide + k, c.dim - k), c.dim - k);
                } else if (value) {
                    if (norm != nullptr) as_values<T>(wide, c.dim, a.moved);
                    write_cache(c, c.v, c.v_scale, c.v_given, a.slots[token] * c.heads + head - a.q_heads - c.heads, wide);
                } else {
                    write_cache(c, c.k, c.k_scale, c.k_given, a.slots[token] * c.heads + head - a.q_heads, wide);
                }
            }
        });
    });
}

// One output's row of a packed integer weight, dequantized: 4 inputs at a time, as they lie in the panel.
template <Type T> INLINE void embed_packed(const Linear& w, int64_t n, typename As<T>::Item* out) {
    const int64_t panel = n / kPanel, lane = n % kPanel;
    const bool four = w.codes == Codes::int4;
    const int64_t inputs = four ? 8 : 4;
    for (int64_t s = 0; s < w.segments; ++s) {
        const int64_t index = (panel * w.groups() + s / w.per_group) * kPanel + lane / 16 * 16;
        alignas(64) float scales[16], values[kSegment + 16];
        alignas(64) int32_t zeros[16];
        store(scales, load_scale(w, index));
        istore(zeros, load_zero(w, index));
        const uint8_t* data = segment_data(w, panel, s) + lane * 4;
        for (int64_t k = 0; k < w.unit; k += inputs, data += 256)
            for (int64_t j = 0; j < inputs; ++j) {
                const int code = four ? (data[j % 4] >> (j / 4 * 4)) & 15 : data[j];
                values[k + j] = float(code - zeros[lane % 16]) * scales[lane % 16];
            }
        const Span span = span_of(w, s);
        for (int64_t k = 0; k < span.count; k += 16) store_some<T>(out + span.first + k, load(values + k), span.count - k);
    }
}

inline void embed(Pool& pool, const EmbedArgs& a) {
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        ranges(pool, a.tokens, a.columns * (a.table != nullptr ? 16 : 2), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                Item* out = static_cast<Item*>(a.out) + t * a.columns;
                if (a.table != nullptr) embed_packed<T>(*a.table, a.ids[t], out);
                else std::memcpy(out, static_cast<const Item*>(a.rows) + a.ids[t] * a.columns, size_t(a.columns) * sizeof(Item));
            }
        });
    });
}

struct Best {
    float value;
    int64_t id;  // -1: nothing seen
};

// Of equal ones the first; a NaN is the largest. The id is found at last, in the block that had the largest.
INLINE Best best_of(const float* x, int64_t first, int64_t last) {
    constexpr int64_t kBlock = 1024;
    Best best{-INFINITY, -1};
    for (int64_t from = first; from < last; from += kBlock) {
        const int64_t to = from + kBlock < last ? from + kBlock : last;
        F most = splat(-INFINITY);
        I ordered = isplat(-1);
        int64_t k = from;
        for (; k + 16 <= to; k += 16) {
            const F v = load(x + k);
            most = max(v, most);
            ordered = ordered & equal(v, v);
        }
        float top = reduce_max(most);
        bool nan = reduce_add(ordered) != -16;
        for (; k < to; ++k) {
            top = x[k] > top ? x[k] : top;
            nan |= x[k] != x[k];
        }
        if (nan) {
            for (k = from; x[k] == x[k]; ++k) {}
            return {x[k], k};
        }
        if (top > best.value || best.id < 0) best = {top, from};
    }
    while (best.id >= 0 && x[best.id] != best.value) ++best.id;
    return best;
}

INLINE bool beats(const Best& a, const Best& b) {  // a comes after b
    if (b.id < 0 || a.id < 0) return b.id < 0 && a.id >= 0;
    return b.value == b.value && (a.value > b.value || a.value != a.value);
}

inline void argmax(Pool& pool, const ArgmaxArgs& a) {
    const int64_t parts = a.rows >= pool.size() ? 1 : pool.size();  // of a row
    Best* found = reinterpret_cast<Best*>(pool.scratch(pool.size(), size_t(a.rows * parts) * sizeof(Best)));
    ranges(pool, a.rows * parts, a.columns / parts * 4, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t part = i % parts;
            found[i] = best_of(a.x + i / parts * a.stride, a.columns * part / parts, a.columns * (part + 1) / parts);
        }
    });
    for (int64_t r = 0; r < a.rows; ++r) {
        Best best = found[r * parts];
        for (int64_t p = 1; p < parts; ++p)
            if (beats(found[r * parts + p], best)) best = found[r * parts + p];
        a.values[r] = best.value;
        a.ids[r] = best.id;
    }
}

// The smallest of the k largest so far is the root of a heap; most of the row never gets past a comparison with it.
inline float kth_largest(Pool& pool, const float* x, int64_t n, int64_t k) {
    float* heap = reinterpret_cast<float*>(pool.scratch(0, size_t(k) * 4));
    const auto sink = [&](int64_t i) {  // heap[i] to its place among its descendants
        const float value = heap[i];
        for (int64_t child; (child = 2 * i + 1) < k; i = child) {
            if (child + 1 < k && heap[child + 1] < heap[child]) ++child;
            if (!(heap[child] < value)) break;
            heap[i] = heap[child];
        }
        heap[i] = value;
    };
    std::memcpy(heap, x, size_t(k) * 4);
    for (int64_t i = k / 2; i-- > 0;) sink(i);
    const auto offer = [&](float value) {
        if (value > heap[0]) {
            heap[0] = value;
            sink(0);
        }
    };
    int64_t i = k;
    for (; i + 16 <= n; i += 16)
        if (any(less(splat(heap[0]), load(x + i))))
            for (int64_t j = i; j < i + 16; ++j) offer(x[j]);
    for (; i < n; ++i) offer(x[i]);
    return heap[0];
}

}  // namespace ISA
}  // namespace appliance
