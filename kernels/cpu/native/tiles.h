// The innermost products: R rows by V vectors of 16 outputs, accumulators in registers. C is float32 with 64 columns a row.
#pragma once
#include "expand.h"

namespace appliance {
namespace ISA {

// Rows and vectors at a time that the registers hold: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int vectors_for(int) { return 4; }
#else
constexpr int vectors_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif

// Bytes before they are multiplied that a weight is asked for, where memory is what few rows wait for: 6 % of one row's decode (Zen 5).
constexpr int64_t kAhead = 3072;

#define UNROLL _Pragma("GCC unroll 8")

template <int N> struct Count { static constexpr int value = N; };

// C += codes of one segment times rounded activations. `w` points at the first vector; 256 bytes on are the next inputs.
// kCodes: what `w` is; bytes (int8) may be unpacked nibbles, too (kWide: bytes above 127 occur).
template <int R, int V, Codes kCodes, bool kWide>
INLINE void dot_segment(const uint8_t* w, int64_t inputs, const int8_t* x, int64_t stride, const float* scale_x, const int32_t* sum_x, int64_t segments,
                        const F* scale, const I* zero, float* c) {
    constexpr bool kNibbles = kCodes != Codes::int8;
    I acc[R][V];
    UNROLL for (int r = 0; r < R; ++r) {
        const I sum = isplat(sum_x[r * segments]);
        UNROLL for (int v = 0; v < V; ++v) acc[r][v] = mul16(zero[v], sum);
    }
    for (int64_t k = 0; k < inputs; k += kNibbles ? 8 : 4, w += 256) {
        I low[V], high[V];
        if constexpr (R <= 2) {
            UNROLL for (int v = 0; v < V; ++v) __builtin_prefetch(w + kAhead + 64 * v, 0, 3);
        }
        UNROLL for (int v = 0; v < V; ++v) {
            const I line = iload(w + 64 * v);
            low[v] = bytes_of<kCodes>(line, false);
            if (kNibbles) high[v] = bytes_of<kCodes>(line, true);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * stride + k, 4);
            const I a = isplat(four);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot4<kWide>(acc[r][v], low[v], a);
        }
        if (kNibbles) UNROLL for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * stride + k + 4, 4);
            const I a = isplat(four);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot4<kWide>(acc[r][v], high[v], a);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        const F factor = splat(scale_x[r * segments]);
        UNROLL for (int v = 0; v < V; ++v) {
            float* at = c + r * kPanel + 16 * v;
            store(at, fma(to_float(acc[r][v]), scale[v] * factor, load(at)));
        }
    }
}

// The segments first .. last - 1 for R rows and the vectors v0 .. v1 - 1 of a panel. `bytes`: the unpacked codes of those segments,
// or null to read the weight itself.
template <int R, int V>
INLINE void dot_rows(const Linear& w, int64_t panel, int64_t first, int64_t last, int v0, int v1, const uint8_t* bytes, const Rounded& x, int64_t row, float* c) {
    const Codes kind = bytes == nullptr ? w.codes : Codes::int8;
    for (int64_t s = first; s < last; ++s) {  // a segment of all outputs, as it lies in memory
        for (int v = v0; v < v1; v += V) {
            const uint8_t* data = (bytes != nullptr ? bytes + (s - first) * w.unit * kPanel : segment_data(w, panel, s)) + 64 * v;
            const int64_t index = (panel * w.groups() + s / w.per_group) * kPanel + 16 * v;
            F scale[V];
            I zero[V];
            UNROLL for (int i = 0; i < V; ++i) {
                scale[i] = load_scale(w, index + 16 * i);
                zero[i] = load_zero(w, index + 16 * i);
            }
            const int8_t* codes = x.codes + x.chunks.at(row, s * w.unit);
            const int64_t side = row * w.segments + s;
            float* at = c + 16 * v;
            const auto dot = [&](auto tag, auto wide) __attribute__((always_inline)) {
                dot_segment<R, V, tag.value, wide.value != 0>(data, w.unit, codes, x.chunks.inputs, x.scales + side, x.sums + side, w.segments, scale, zero, at);
            };
            if (kind == Codes::int4) dot(CodesTag<Codes::int4>{}, Count<false>{});
            else if (kind == Codes::fp4) dot(CodesTag<Codes::fp4>{}, Count<false>{});
            else if (w.four()) dot(CodesTag<Codes::int8>{}, Count<false>{});
            else dot(CodesTag<Codes::int8>{}, Count<true>{});
        }
    }
}

// C += x [R, inputs] times w [inputs][64], both float32.
template <int R, int V> INLINE void fma_tile(const float* w, int64_t inputs, const float* x, int64_t stride, float* c) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) acc[r][v] = load(c + r * kPanel + 16 * v);
    for (int64_t k = 0; k < inputs; ++k) {
        F b[V];
        UNROLL for (int v = 0; v < V; ++v) b[v] = load(w + k * kPanel + 16 * v);
        UNROLL for (int r = 0; r < R; ++r) {
            const F a = splat(x[r * stride + k]);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) store(c + r * kPanel + 16 * v, acc[r][v]);
}

template <int R, int V> INLINE void fma_rows(const float* w, int64_t inputs, int v0, int v1, const float* x, int64_t stride, float* c) {
    for (int v = v0; v < v1; v += V) fma_tile<R, V>(w + 16 * v, inputs, x, stride, c + 16 * v);
}

// C += codes of one segment times float32 activations, for few rows: codes become floats in registers, zero and scale come last.
template <int R, int V, Codes kCodes>
INLINE void fma_segment(const uint8_t* w, int64_t unit, const float* x, int64_t stride, const F* scale, const F* zero, float* c) {
    F acc[R][V], sum[R];
    UNROLL for (int r = 0; r < R; ++r) {
        F all = splat(0);
        for (int64_t k = 0; k < unit; k += 16) all = all + load_some<Type::f32>(x + r * stride + k, unit - k);
        sum[r] = splat(reduce_add(all));
        UNROLL for (int v = 0; v < V; ++v) acc[r][v] = splat(0);
    }
    constexpr int64_t kInputs = kCodes == Codes::int8 ? 4 : 8, kStep = kCodes == Codes::fp4 ? 4 : kInputs;  // looked up four at a time
    const I mask = isplat(kCodes == Codes::int4 ? 15 : 255);
    for (int64_t k = 0; k < unit; k += kInputs, w += 256)
        for (int64_t first = 0; first < kInputs; first += kStep) {
            I line[V];
            UNROLL for (int v = 0; v < V; ++v) line[v] = kCodes == Codes::fp4 ? bytes_of<kCodes>(iload(w + 64 * v), first != 0) : iload(w + 64 * v);
            for (int64_t j = 0; j < kStep; ++j) {
                const int shift = int(j % 4 * 8 + j / 4 * 4);
                F q[V];
                UNROLL for (int v = 0; v < V; ++v) q[v] = to_float((line[v] >> shift) & mask);
                UNROLL for (int r = 0; r < R; ++r) {
                    const F a = splat(x[r * stride + k + first + j]);
                    UNROLL for (int v = 0; v < V; ++v) acc[r][v] = fma(a, q[v], acc[r][v]);
                }
            }
        }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) {
        float* at = c + r * kPanel + 16 * v;
        store(at, fma(acc[r][v] - zero[v] * sum[r], scale[v], load(at)));
    }
}

template <int R, int V>
INLINE void fma_direct(const Linear& w, int64_t panel, int64_t segment, int v0, int v1, const float* x, int64_t stride, float* c) {
    for (int v = v0; v < v1; v += V) {
        const int64_t index = (panel * w.groups() + segment / w.per_group) * kPanel + 16 * v;
        F scale[V], zero[V];
        UNROLL for (int i = 0; i < V; ++i) {
            scale[i] = load_scale(w, index + 16 * i);
            zero[i] = to_float(load_zero(w, index + 16 * i));
        }
        with_codes(w.codes, [&](auto tag) __attribute__((always_inline)) {
            fma_segment<R, V, tag.value>(segment_data(w, panel, segment) + 64 * v, w.unit, x, stride, scale, zero, c + 16 * v);
        });
    }
}

#if defined(__AVX512BF16__)
// The same with pairs of bfloat16: w [inputs / 2][64][2].
template <int R, int V> INLINE void pair_rows(const uint16_t* w, int64_t inputs, int v0, int v1, const uint16_t* x, int64_t stride, float* c) {
    for (int v = v0; v < v1; v += V) {
        F acc[R][V];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int i = 0; i < V; ++i) acc[r][i] = load(c + r * kPanel + 16 * (v + i));
        for (int64_t k = 0; k < inputs; k += 2) {
            I b[V];
            UNROLL for (int i = 0; i < V; ++i) b[i] = iload(w + k * kPanel + 32 * (v + i));
            UNROLL for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, x + r * stride + k, 4);
                const I a = isplat(two);
                UNROLL for (int i = 0; i < V; ++i) acc[r][i] = dot2(acc[r][i], b[i], a);
            }
        }
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int i = 0; i < V; ++i) store(c + r * kPanel + 16 * (v + i), acc[r][i]);
    }
}
#endif

// g(R, V) with the number of rows (1 to 6) and of vectors at a time as template arguments; v1 - v0 is a multiple of V. Half a
// panel (2 vectors) is what threads share of a weight with few outputs.
template <int R, class G> INLINE void with_vectors(int64_t width, G&& g) {
    if constexpr (vectors_for(R) == 4)
        if (width < 4) return g(Count<R>{}, Count<2>{});
    g(Count<R>{}, Count<vectors_for(R)>{});
}
template <class G> INLINE void with_shape(int64_t rows, int64_t width, G&& g) {
    switch (rows) {
        case 1: return with_vectors<1>(width, g);
        case 2: return with_vectors<2>(width, g);
        case 3: return with_vectors<3>(width, g);
        case 4: return with_vectors<4>(width, g);
        case 5: return with_vectors<5>(width, g);
        default: return with_vectors<6>(width, g);
    }
}

}  // namespace ISA
}  // namespace appliance
