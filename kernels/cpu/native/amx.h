// Products by tiles of 16 rows by 64 bytes (Intel AMX): int8, and pairs of bfloat16.
//
// The unpacked weights are what tiles want as they are: a row of a right-hand tile is 16 outputs by 4 bytes (or 2 bfloat16), and
// the rows below are 256 bytes apart. EMULATE_AMX builds the same code on plain loops, so that it is tested where there is no AMX.
#pragma once
#include "tiles.h"

namespace appliance {
namespace ISA {

#if defined(__AMX_INT8__) || defined(EMULATE_AMX)
#define HAVE_TILES 1

// Tiles 0 to 3 are sums (2 by 2), 4 and 5 the left-hand side, 6 and 7 the right-hand side.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

#if defined(EMULATE_AMX)
struct Emulated {
    TileConfig config;
    uint8_t data[8][16][64];
};
inline thread_local Emulated emulated;

INLINE void configure(const TileConfig& config) { emulated.config = config; }
INLINE void release() {}
template <int T> INLINE void tile_zero() { std::memset(emulated.data[T], 0, sizeof emulated.data[T]); }
template <int T> INLINE void tile_load(const void* p, int64_t stride) {
    for (int r = 0; r < emulated.config.rows[T]; ++r) std::memcpy(emulated.data[T][r], static_cast<const char*>(p) + r * stride, emulated.config.bytes[T]);
}
template <int T> INLINE void tile_store(void* p, int64_t stride) {
    for (int r = 0; r < emulated.config.rows[T]; ++r) std::memcpy(static_cast<char*>(p) + r * stride, emulated.data[T][r], emulated.config.bytes[T]);
}
// Sums of a row for its 16 outputs side by side, which compilers make vectors of; each adds up its products in order.
template <int C, int A, int B> inline void tile_dot() {  // signed bytes times unsigned bytes
    for (int m = 0; m < emulated.config.rows[A]; ++m) {
        int32_t sums[16];
        std::memcpy(sums, emulated.data[C][m], sizeof sums);
        for (int k = 0; k < emulated.config.bytes[A]; ++k) {
            uint32_t words[16];
            std::memcpy(words, emulated.data[B][k / 4], sizeof words);
            const int x = int8_t(emulated.data[A][m][k]), shift = 8 * (k % 4);
            for (int n = 0; n < 16; ++n) sums[n] += x * int(words[n] >> shift & 255);
        }
        std::memcpy(emulated.data[C][m], sums, sizeof sums);
    }
}
template <int C, int A, int B> inline void tile_dot_pairs() {
    for (int m = 0; m < emulated.config.rows[A]; ++m) {
        float sums[16];
        std::memcpy(sums, emulated.data[C][m], sizeof sums);
        for (int k = 0; k < emulated.config.bytes[A] / 2; ++k) {
            uint16_t half;
            std::memcpy(&half, &emulated.data[A][m][2 * k], sizeof half);
            uint32_t words[16], left = uint32_t(half) << 16;
            std::memcpy(words, emulated.data[B][k / 2], sizeof words);
            for (int n = 0; n < 16; ++n) words[n] = k % 2 ? words[n] & 0xffff0000u : words[n] << 16;
            float x, y[16];
            std::memcpy(&x, &left, sizeof x);
            std::memcpy(y, words, sizeof y);
            for (int n = 0; n < 16; ++n) sums[n] += x * y[n];
        }
        std::memcpy(emulated.data[C][m], sums, sizeof sums);
    }
}
#else
// The "memory" clobbers matter: GCC 12's own intrinsics let it drop the stores that make up the configuration.
INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
INLINE void release() { asm volatile("tilerelease" : : : "memory"); }
template <int T> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> INLINE void tile_load(const void* p, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory"); }
template <int T> INLINE void tile_store(void* p, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory"); }
template <int C, int A, int B> INLINE void tile_dot() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B> INLINE void tile_dot_pairs() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
#endif

constexpr int64_t kTileRows = 16;
constexpr int64_t kLeastRows = 8;  // fewer are as fast without tiles

INLINE int64_t tile_inputs(const Linear& w) { return w.unit < 64 ? w.unit : 64; }
INLINE bool use_tiles(const Linear& w, int64_t rows) {
    return rows >= kLeastRows && (w.quantize ? w.unit == 32 || w.unit == 64 || w.unit == 128 : true);
}

INLINE void start_tiles(const Linear& w, int64_t rows) {
    if (!use_tiles(w, rows)) return;
    TileConfig config;
    const int64_t bytes = w.quantize ? tile_inputs(w) : 64;
    for (int t = 0; t < 8; ++t) {
        config.rows[t] = uint8_t(t >= 6 ? bytes / 4 : kTileRows);
        config.bytes[t] = uint16_t(t == 4 || t == 5 ? bytes : 64);
    }
    configure(config);
}
INLINE void stop_tiles(const Linear& w, int64_t rows) {
    if (use_tiles(w, rows)) release();
}

// Integer sums of one segment for up to 32 rows and 32 outputs -> sums[2][2][16][16].
template <bool kTwo> INLINE void sum_tiles(const uint8_t* bytes, int64_t unit, int64_t step, const int8_t* x, int64_t stride, int32_t* sums) {
    tile_zero<0>();
    tile_zero<1>();
    if (kTwo) {
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t k = 0; k < unit; k += step) {
        tile_load<4>(x + k, stride);
        tile_load<6>(bytes + k * kPanel, 256);
        tile_load<7>(bytes + k * kPanel + 64, 256);
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        if (kTwo) {
            tile_load<5>(x + k + kTileRows * stride, stride);
            tile_dot<2, 5, 6>();
            tile_dot<3, 5, 7>();
        }
    }
    tile_store<0>(sums, 64);
    tile_store<1>(sums + 256, 64);
    if (kTwo) {
        tile_store<2>(sums + 512, 64);
        tile_store<3>(sums + 768, 64);
    }
}

// C += those sums, scaled, for the vectors v and v + 1.
INLINE void add_tiles(const Linear& w, int64_t panel, int64_t segment, const Rounded& x, int64_t row, int64_t rows, int v, const int32_t* sums, float* c) {
    const int64_t index = (panel * w.groups() + segment / w.per_group) * kPanel + 16 * v;
    const F scale[2] = {load_scale(w, index), load_scale(w, index + 16)};
    const I zero[2] = {load_zero(w, index), load_zero(w, index + 16)};
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t side = (row + r) * w.segments + segment;
        const F factor = splat(x.scales[side]);
        const I sum = isplat(x.sums[side]);
        UNROLL for (int i = 0; i < 2; ++i) {
            float* at = c + (row + r) * kPanel + 16 * (v + i);
            const I all = iload(sums + r / 16 * 512 + i * 256 + r % 16 * 16) + mul16(zero[i], sum);
            store(at, fma(to_float(all), scale[i] * factor, load(at)));
        }
    }
}

// The rows of x and of c beyond `rows` up to a multiple of 16 exist, and hold anything.
INLINE void tile_integers(const Linear& w, const Rounded& x, int64_t rows, int64_t panel, uint8_t* scratch, float* c) {
    const int64_t chunk = 2 * kSegment / w.unit, step = tile_inputs(w);
    alignas(64) int32_t sums[2][1024];
    for (int64_t first = 0; first < w.segments; first += chunk) {
        const int64_t last = first + chunk < w.segments ? first + chunk : w.segments;
        const uint8_t* bytes = segment_data(w, panel, first);
        if (w.four()) {
            unpack_nibbles(w, bytes, (last - first) * w.unit, scratch);
            bytes = scratch;
        }
        for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
            const int64_t count = rows - row < 2 * kTileRows ? rows - row : 2 * kTileRows;
            // The tiles of one turn run beside the vector work on the sums of the turn before.
            int turn = 0, v_before = 0;
            int64_t s_before = -1;
            for (int64_t s = first; s < last; ++s)
                for (int v = 0; v < 4; v += 2, ++turn) {
                    const int8_t* codes = x.codes + x.chunks.at(row, s * w.unit);
                    const uint8_t* data = bytes + (s - first) * w.unit * kPanel + 64 * v;
                    if (count > kTileRows) sum_tiles<true>(data, w.unit, step, codes, x.chunks.inputs, sums[turn % 2]);
                    else sum_tiles<false>(data, w.unit, step, codes, x.chunks.inputs, sums[turn % 2]);
                    if (s_before >= 0) add_tiles(w, panel, s_before, x, row, count, v_before, sums[(turn + 1) % 2], c);
                    s_before = s;
                    v_before = v;
                }
            add_tiles(w, panel, s_before, x, row, count, v_before, sums[(turn + 1) % 2], c);
        }
    }
}

// C += x [rows, 64] times w [32][64][2], pairs of bfloat16.
INLINE void tile_pairs(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t rows, float* c) {
    for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
        const bool two = rows - row > kTileRows;
        for (int v = 0; v < 4; v += 2) {
            float* at = c + row * kPanel + 16 * v;
            tile_load<0>(at, 256);
            tile_load<1>(at + 16, 256);
            if (two) {
                tile_load<2>(at + kTileRows * kPanel, 256);
                tile_load<3>(at + kTileRows * kPanel + 16, 256);
            }
            for (int64_t k = 0; k < 64; k += 32) {
                tile_load<4>(x + row * stride + k, stride * 2);
                tile_load<6>(w + k * kPanel + 32 * v, 256);
                tile_load<7>(w + k * kPanel + 32 * (v + 1), 256);
                tile_dot_pairs<0, 4, 6>();
                tile_dot_pairs<1, 4, 7>();
                if (two) {
                    tile_load<5>(x + (row + kTileRows) * stride + k, stride * 2);
                    tile_dot_pairs<2, 5, 6>();
                    tile_dot_pairs<3, 5, 7>();
                }
            }
            tile_store<0>(at, 256);
            tile_store<1>(at + 16, 256);
            if (two) {
                tile_store<2>(at + kTileRows * kPanel, 256);
                tile_store<3>(at + kTileRows * kPanel + 16, 256);
            }
        }
    }
}
#else
INLINE void start_tiles(const Linear&, int64_t) {}
INLINE void stop_tiles(const Linear&, int64_t) {}
#endif

}  // namespace ISA
}  // namespace appliance
