// Chunks of 64 keys and values on their way from the paged cache to the products of attention.
#pragma once
#include "matmul.h"
#include "transpose.h"

namespace appliance {
namespace ISA {

constexpr int64_t kKeys = 64;  // in a chunk: a panel's width

// A thread's memory.
struct Tile {
    float* queries;  // [rows][dim], or pairs of bfloat16
    float* keys;     // [dim][64], or [dim / 2][64][2]
    float* values;   // [panels][64 keys][64], or [panels][32][64][2]
    float* scores;   // [rows][64]
    float* shares;   // the same after the softmax, in what the product takes
    float* out;      // [panels][rows][64]
    float* most;     // [rows]
    float* sums;     // [rows][16]: sixteen partial sums each

    static INLINE int64_t floats(int64_t rows, int64_t dim, int64_t panels) {
        return (rows + kKeys) * (dim + 16) + panels * kPanel * (kKeys + rows) + rows * (2 * kKeys + 32) + 256;
    }
    INLINE Tile(float* p, int64_t rows, int64_t dim, int64_t panels) {
        const int64_t width = (dim + 15) / 16 * 16;
        queries = p;
        keys = queries + rows * width;
        values = keys + width * kKeys;
        scores = values + panels * kKeys * kPanel;
        shares = scores + rows * kKeys;
        out = shares + rows * kKeys;
        sums = out + panels * rows * kPanel;
        most = sums + rows * 16;
    }
};

// Where the keys base .. base + 63 of a sequence lie: their numbers as items [slot][head] of the cache. Returns how many exist.
INLINE int64_t locate(const AttentionArgs& a, int64_t sequence, int64_t base, int64_t last, int64_t head, int64_t* items) {
    const int32_t* table = a.tables + sequence * a.width;
    const int64_t size = a.cache.block_size, n = last - base < kKeys ? last - base : kKeys;
    int64_t block = base / size, offset = base % size;
    for (int64_t i = 0; i < n; ++i) {
        items[i] = (table[block] * size + offset) * a.cache.heads + head;
        if (++offset == size) {
            offset = 0;
            ++block;
        }
    }
    return n;
}

// The chunk after this one, asked for little by little: a processor keeps a few dozen requests in flight, and waits with more.
struct Ahead {
    const Cache& c;
    const int64_t* items;
    int64_t left, together, head = 0;

    INLINE void ask(int64_t n) {
        const int64_t bytes = c.dim * item_size(c.type);
        for (; n > 0 && left > 0; --n) {
            prefetch(static_cast<const uint8_t*>(c.k) + (*items + head) * bytes, bytes);
            prefetch(static_cast<const uint8_t*>(c.v) + (*items + head) * bytes, bytes);
            if (++head == together) {
                head = 0;
                --left;
                ++items;
            }
        }
    }
};

template <Type C> INLINE F load_feature(const void* data, const float* scales, int64_t item, int64_t dim, int64_t d) {
    const F x = load_some<C>(static_cast<const typename As<C>::Item*>(data) + item * dim + d, dim - d);
    return C == Type::i8 ? x * splat(scales[item]) : x;
}

// Keys to [dim][64] and values to [panels][64][64] in float32; what is not there is 0.
template <Type C> INLINE void widen_chunk(const Cache& c, const int64_t* items, int64_t n, int64_t head, int64_t panels, const Tile& t, Ahead& ahead) {
    for (int64_t d = 0; d < c.dim; d += 16)
        for (int64_t key = 0; key < kKeys; key += 16) {
            I rows[16];
            for (int64_t i = 0; i < 16; ++i) rows[i] = key + i < n ? as_int(load_feature<C>(c.k, c.k_scale, items[key + i] + head, c.dim, d)) : isplat(0);
            transpose(rows, t.keys + d * kKeys + key, kKeys * 4);
            ahead.ask(1);
        }
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t key = 0; key < kKeys; ++key) {
            ahead.ask(key % 2);
            for (int64_t d = 0; d < kPanel; d += 16) {
                const bool there = key < n && panel * kPanel + d < c.dim;
                store(t.values + (panel * kKeys + key) * kPanel + d, there ? load_feature<C>(c.v, c.v_scale, items[key] + head, c.dim, panel * kPanel + d) : splat(0));
            }
        }
}

// The same in pairs of bfloat16: [dim / 2][64][2] and [panels][32][64][2]. `dim` is even.
INLINE void pair_chunk(const Cache& c, const int64_t* items, int64_t n, int64_t head, int64_t panels, const Tile& t, Ahead& ahead) {
    const uint16_t *k = static_cast<const uint16_t*>(c.k), *v = static_cast<const uint16_t*>(c.v);
    for (int64_t d = 0; d < c.dim; d += 32)
        for (int64_t key = 0; key < kKeys; key += 16) {
            I rows[16];
            for (int64_t i = 0; i < 16; ++i) {
                const uint16_t* from = k + (items[key + i < n ? key + i : 0] + head) * c.dim + d;
                if (key + i >= n) rows[i] = isplat(0);
                else if (d + 32 <= c.dim) rows[i] = iload(from);
                else {
                    alignas(64) uint16_t some[32] = {};
                    std::memcpy(some, from, size_t(c.dim - d) * 2);
                    rows[i] = iload(some);
                }
            }
            transpose(rows, t.keys + d / 2 * kKeys + key, kKeys * 4);
            ahead.ask(2);
        }
    const auto bits = [&](int64_t key, int64_t d) {
        if (key >= n || d >= c.dim) return isplat(0);
        const uint16_t* from = v + (items[key] + head) * c.dim + d;
        if (d + 16 <= c.dim) return widen_u16(from);
        uint16_t some[16] = {};
        std::memcpy(some, from, size_t(c.dim - d) * 2);
        return widen_u16(some);
    };
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t key = 0; key < kKeys; key += 2) {
            ahead.ask(key % 8 != 0);
            for (int64_t d = 0; d < kPanel; d += 16)
                istore(t.values + (panel * kKeys + key) / 2 * kPanel + d, bits(key, panel * kPanel + d) | (bits(key + 1, panel * kPanel + d) << 16));
        }
}

}  // namespace ISA
}  // namespace appliance
