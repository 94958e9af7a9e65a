// Chunks of 64 keys and values on their way from the paged cache to the products of attention.
#pragma once
#include "cache.h"
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
    float* shifted;  // the same of shares times value_shifts
    float* queried;  // [rows]: the sum of a query's features
    float *key_scales, *key_shifts, *value_scales, *value_shifts;  // [64]

    static INLINE int64_t floats(int64_t rows, int64_t dim, int64_t panels) {
        return (rows + kKeys) * (dim + 16) + panels * kPanel * (kKeys + rows) + rows * (2 * kKeys + 64) + 4 * kKeys + 256;
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
        shifted = sums + rows * 16;
        key_scales = shifted + rows * 16;
        key_shifts = key_scales + kKeys;
        value_scales = key_shifts + kKeys;
        value_shifts = value_scales + kKeys;
        most = value_shifts + kKeys;
        queried = most + rows;
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
        const int64_t bytes = c.row_bytes();
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

// What the codes of a chunk of one head are worth: a score is key_scales * (q . codes) + key_shifts * sum(q), and an output the sum of
// shares * (value_scales * codes + value_shifts); shifts are of four bits only. 0 where there is no key.
INLINE void load_scales(const Cache& c, const int64_t* items, int64_t n, int64_t head, const Tile& t) {
    const auto one = [&](const void* from, float* scales, float* shifts) {
        if (c.type != Type::i4) {
            for (int64_t i = 0; i < kKeys; ++i) scales[i] = i < n ? static_cast<const float*>(from)[items[i] + head] : 0;
            return;
        }
        uint16_t halves[2][kKeys];
        for (int64_t i = 0; i < kKeys; ++i)
            for (int j = 0; j < 2; ++j) halves[j][i] = i < n ? static_cast<const uint16_t*>(from)[2 * (items[i] + head) + j] : 0;
        for (int64_t i = 0; i < kKeys; i += 16) {
            const F step = f16_to_float(halves[0] + i);
            store(scales + i, step);
            store(shifts + i, fma(step, splat(kMiddle), f16_to_float(halves[1] + i)));
        }
    };
    one(c.k_scale, t.key_scales, t.key_shifts);
    one(c.v_scale, t.value_scales, t.value_shifts);
}

// Keys to [dim][64] and values to [panels][64][64] in float32, of codes without their scales; what is not there is 0.
template <Type C> inline void widen_chunk(const Cache& c, const int64_t* items, int64_t n, int64_t head, int64_t panels, const Tile& t, Ahead& ahead) {
    const int64_t bytes = c.row_bytes();
    const uint8_t *k = static_cast<const uint8_t*>(c.k) + head * bytes, *v = static_cast<const uint8_t*>(c.v) + head * bytes;
    for (int64_t key = 0; key < kKeys; key += 16)  // rows outermost: their lines may all fall on few sets of the first cache
        for (int64_t d = 0; d < c.dim; d += 16) {
            I rows[16];
            for (int64_t i = 0; i < 16; ++i) rows[i] = key + i < n ? as_int(load_codes<C>(k + items[key + i] * bytes, d, c.dim)) : isplat(0);
            transpose(rows, t.keys + d * kKeys + key, kKeys * 4);
            ahead.ask(1);
        }
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t key = 0; key < kKeys; ++key) {
            ahead.ask(key % 2);
            for (int64_t d = 0; d < kPanel; d += 16) {
                const bool there = key < n && panel * kPanel + d < c.dim;
                store(t.values + (panel * kKeys + key) * kPanel + d, there ? load_codes<C>(v + items[key] * bytes, panel * kPanel + d, c.dim) : splat(0));
            }
        }
}

#if defined(__AVX512BF16__)
// Features d .. d + 31 as pairs of bfloat16; what is beyond `dim` is 0.
template <Type C> INLINE I feature_pairs(const uint8_t* row, int64_t d, int64_t dim) {
    if constexpr (C == Type::bf16) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + d;
        if (d + 32 <= dim) return iload(from);
        alignas(64) uint16_t some[32] = {};
        std::memcpy(some, from, size_t(dim - d) * 2);
        return iload(some);
    } else {
        const F low = load_codes<C>(row, d, dim), high = d + 16 < dim ? load_codes<C>(row, d + 16, dim) : splat(0);
        return {{(vi)_mm512_cvtne2ps_pbh((__m512)high.v[0], (__m512)low.v[0])}};
    }
}

// Features d .. d + 15 in bfloat16, in the upper half of their lanes.
template <Type C> INLINE I upper_halves(const uint8_t* row, int64_t d, int64_t dim) { return as_int(load_codes<C>(row, d, dim)); }

// Keys to [dim / 2][64][2] and values to [panels][32][64][2] in bfloat16, of codes without their scales. `dim` is even.
template <Type C> inline void pair_chunk(const Cache& c, const int64_t* items, int64_t n, int64_t head, int64_t panels, const Tile& t, Ahead& ahead) {
    const int64_t bytes = c.row_bytes();
    const uint8_t *k = static_cast<const uint8_t*>(c.k) + head * bytes, *v = static_cast<const uint8_t*>(c.v) + head * bytes;
    for (int64_t key = 0; key < kKeys; key += 16)  // rows outermost: their lines may all fall on few sets of the first cache
        for (int64_t d = 0; d < c.dim; d += 32) {
            I rows[16];
            for (int64_t i = 0; i < 16; ++i) rows[i] = key + i < n ? feature_pairs<C>(k + items[key + i] * bytes, d, c.dim) : isplat(0);
            transpose(rows, t.keys + d / 2 * kKeys + key, kKeys * 4);
            ahead.ask(2);
        }
    const auto bits = [&](int64_t key, int64_t d) { return key < n && d < c.dim ? upper_halves<C>(v + items[key] * bytes, d, c.dim) : isplat(0); };
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t key = 0; key < kKeys; key += 2) {
            ahead.ask(key % 8 != 0);
            for (int64_t d = 0; d < kPanel; d += 16)
                istore(t.values + (panel * kKeys + key) / 2 * kPanel + d, (bits(key, panel * kPanel + d) >> 16) | bits(key + 1, panel * kPanel + d));
        }
}
#endif

}  // namespace ISA
}  // namespace appliance
