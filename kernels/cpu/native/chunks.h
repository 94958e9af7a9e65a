// Chunks of 64 keys and values on their way from the paged cache to the products of attention.
#pragma once
#include "cache.h"
#include "matmul.h"
#include "transpose.h"

namespace appliance {
namespace ISA {

constexpr int64_t kKeys = 64;  // in a chunk: a panel's width
#if defined(__AVX512F__)
#define UNROLL16 _Pragma("GCC unroll 16")
#else
#define UNROLL16  // registers hold half of that: unrolled it took twice the time
#endif

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
            if (c.v != c.k) prefetch(static_cast<const uint8_t*>(c.v) + (*items + head) * bytes, bytes);
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

// Where the keys and values of one head begin; those that are not there are zeros.
struct Rows {
    const uint8_t *keys[kKeys], *values[kKeys];
    INLINE Rows(const Cache& c, const int64_t* items, int64_t n, int64_t head) {
        alignas(64) static const uint8_t kNothing[kMostFeatures * 4] = {};
        const int64_t bytes = c.row_bytes();
        const uint8_t *k = static_cast<const uint8_t*>(c.k) + head * bytes, *v = static_cast<const uint8_t*>(c.v) + head * bytes;
        for (int64_t i = 0; i < kKeys; ++i) {
            keys[i] = i < n ? k + items[i] * bytes : kNothing;
            values[i] = i < n ? v + items[i] * bytes : kNothing;
        }
    }
};

// Features in a line of memory. All keys' first lines are read, then all second ones, each as a whole: the rows of a chunk may all
// fall on few sets of the first cache.
template <Type C> constexpr int64_t kLine = C == Type::i4 ? 128 : 64 / int64_t(sizeof(typename As<C>::Item));

// Keys to [dim][64] and values to [panels][64][64] in float32, of codes without their scales. kWhole: `dim` is a multiple of 32.
template <Type C, bool kWhole> inline void widen_chunk(const Rows& from, int64_t dim, int64_t panels, const Tile& t, Ahead& ahead) {
    for (int64_t line = 0; line < dim; line += kLine<C>)
        for (int64_t key = 0; key < kKeys; key += 16)
            for (int64_t d = line; d < dim && d < line + kLine<C>; d += 16) {
                I rows[16];
                UNROLL16 for (int i = 0; i < 16; ++i) rows[i] = as_int(load_codes<C, kWhole>(from.keys[key + i], d, dim));
                transpose(rows, t.keys + d * kKeys + key, kKeys * 4);
                ahead.ask(1);
            }
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t key = 0; key < kKeys; ++key) {
            ahead.ask(key % 2);
            float* to = t.values + (panel * kKeys + key) * kPanel;
            UNROLL for (int64_t d = 0; d < kPanel; d += 16) {
                const int64_t feature = panel * kPanel + d;
                store(to + d, feature < dim ? load_codes<C, kWhole>(from.values[key], feature, dim) : splat(0));
            }
        }
}

#if defined(__AVX512BF16__)
// Features d .. d + 31 in bfloat16; kWhole: all are there, else what is beyond `dim` is 0.
template <Type C, bool kWhole> INLINE __m512i features(const uint8_t* row, int64_t d, int64_t dim) {
    if constexpr (C == Type::bf16 && kWhole) {
        return _mm512_loadu_si512(reinterpret_cast<const uint16_t*>(row) + d);
    } else if constexpr (C == Type::i4 && kWhole) {  // -8 .. 7 in bfloat16, looked up
        const __m512i table = _mm512_castsi256_si512(_mm256_setr_epi16(
            short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040), short(0xc000), short(0xbf80),
            0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        const I two = widen_u8(row + d / 2), each = (two & isplat(15)) | ((two & isplat(0xf0)) << 12);
        return _mm512_permutexvar_epi16((__m512i)each.v[0], table);
    } else {
        const F low = load_codes<C, kWhole>(row, d, dim), high = kWhole || d + 16 < dim ? load_codes<C, kWhole>(row, d + 16, dim) : splat(0);
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)high.v[0], (__m512)low.v[0]);
    }
}

// Keys to [dim / 2][64][2] and values to [panels][32][64][2] in bfloat16, of codes without their scales. `dim` is even.
template <Type C, bool kWhole> inline void pair_chunk(const Rows& from, int64_t dim, int64_t panels, const Tile& t, Ahead& ahead) {
    for (int64_t line = 0; line < dim; line += kLine<C>)
        for (int64_t key = 0; key < kKeys; key += 16)
            for (int64_t d = line; d < dim && d < line + kLine<C>; d += 32) {
                I rows[16];
                UNROLL16 for (int i = 0; i < 16; ++i) rows[i].v[0] = (vi)features<C, kWhole>(from.keys[key + i], d, dim);
                transpose(rows, t.keys + d / 2 * kKeys + key, kKeys * 4);
                ahead.ask(1);
            }
    alignas(64) static constexpr uint16_t kBoth[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i low = _mm512_load_si512(kBoth[0]), high = _mm512_load_si512(kBoth[1]);
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t key = 0; key < kKeys; key += 2) {
            ahead.ask(key % 4 == 0);
            float* to = t.values + (panel * kKeys + key) / 2 * kPanel;
            UNROLL for (int64_t d = 0; d < kPanel; d += 32) {
                __m512i a = _mm512_setzero_si512(), b = a;
                if (panel * kPanel + d < dim) {
                    a = features<C, kWhole>(from.values[key], panel * kPanel + d, dim);
                    b = features<C, kWhole>(from.values[key + 1], panel * kPanel + d, dim);
                }
                _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, low, b));
                _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, high, b));
            }
        }
}
#endif

INLINE void load_chunk(const Cache& c, const Rows& from, bool pairs, int64_t panels, const Tile& t, Ahead& ahead) {
    (void)pairs;
    const auto load = [&](auto whole) {
        with_cache(c.type, [&](auto tag) {
            constexpr Type C = decltype(tag)::value;
            constexpr bool kWhole = decltype(whole)::value;
#if defined(__AVX512BF16__)
            if constexpr (C != Type::f32 && C != Type::f16)
                if (pairs) return pair_chunk<C, kWhole>(from, c.dim, panels, t, ahead);
#endif
            widen_chunk<C, kWhole>(from, c.dim, panels, t, ahead);
        });
    };
    c.dim % 32 == 0 ? load(Count<true>{}) : load(Count<false>{});
}

}  // namespace ISA
}  // namespace appliance
