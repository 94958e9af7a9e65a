// Activations for a product: widened, normalized, put in the packed order, and rounded to int8 where the weight wants that.
#pragma once
#include "convert.h"

namespace appliance {
namespace ISA {

// Also 4-bit floats, which expand.h makes integers of.
INLINE bool is_integer(const Linear& w) { return w.four() || w.codes == Codes::int8; }

// Inputs of the packed order, padding included.
INLINE int64_t depth(const Linear& w) { return is_integer(w) ? w.segments * w.unit : (w.K + 1) / 2 * 2; }

struct Span {
    int64_t first, count;  // inputs of a segment
};

INLINE Span span_of(const Linear& w, int64_t segment) {
    const int64_t group = segment / w.per_group, first = group * w.group + segment % w.per_group * kSegment;
    int64_t end = (group + 1) * w.group;
    if (first + kSegment < end) end = first + kSegment;
    if (w.K < end) end = w.K;
    return {first, end - first};
}

// Row `row` of x in float32, normalized, in the packed order of the inputs: K values and 16 zeros.
INLINE void widen_row(const MatmulArgs& a, int64_t row, float* out, float* spare) {
    const Linear& w = *a.weight;
    float* straight = w.perm == nullptr ? out : spare;
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        const Item* x = static_cast<const Item*>(a.x) + (a.gather != nullptr ? a.gather[row] : row) * a.stride;
        F squares = splat(0);
        for (int64_t k = 0; k < w.K; k += 16) {
            const F v = load_some<T>(x + k, w.K - k);
            squares = fma(v, v, squares);
            store(straight + k, v);
        }
        if (a.norm != nullptr) {
            const F factor = splat(1.0f / std::sqrt(reduce_add(squares) / float(w.K) + a.eps));
            const Item* norm = static_cast<const Item*>(a.norm);
            const F offset = splat(a.offset);
            for (int64_t k = 0; k < w.K; k += 16) store(straight + k, load(straight + k) * factor * (load_some<T>(norm + k, w.K - k) + offset));
        }
    });
    if (w.perm != nullptr)
        for (int64_t k = 0; k < w.K; ++k) out[k] = straight[w.perm[k]];
    for (int64_t k = w.K; k < w.K + 16; ++k) out[k] = 0;
}

// Prepared rows lie in chunks of the inputs, so that the rows that meet a piece of the weight are read one after another:
// [chunk][row][inputs of a chunk].
struct Chunks {
    int64_t rows = 0, inputs = 0;
    INLINE int64_t at(int64_t row, int64_t input) const { return (input / inputs * rows + row) * inputs + input % inputs; }
};

// Rows rounded to int8.
struct Rounded {
    int8_t* codes;
    Chunks chunks;   // of whole segments
    float* scales;   // [rows][segments]
    int32_t* sums;   // [rows][segments]: minus the sum of a segment's codes
};

INLINE void store_codes(int8_t* to, I codes, int64_t n) {
    if (n >= 16) return narrow_8(to, codes);
    int8_t all[16];
    narrow_8(all, codes);
    std::memcpy(to, all, 8);  // segments are padded to multiples of 8
}

INLINE float largest(const float* x, int64_t n) {
    F m = splat(0);
    for (int64_t k = 0; k < n; k += 16) m = max(m, abs(load_some<Type::f32>(x + k, n - k)));
    return reduce_max(m);
}

INLINE void round_row(const Linear& w, const float* x, const Rounded& out, int64_t row) {
    float* scales = out.scales + row * w.segments;
    int32_t* sums = out.sums + row * w.segments;
    const float token = w.per_token ? largest(x, w.K) / 127.0f : 0.0f;
    for (int64_t s = 0; s < w.segments; ++s) {
        const Span span = span_of(w, s);
        const float* from = x + span.first;
        int8_t* to = out.codes + out.chunks.at(row, s * w.unit);
        const float scale = w.per_token ? token : largest(from, span.count) / 127.0f;
        const F inverse = splat(scale > 1e-30f ? 1.0f / scale : 0.0f);
        I sum = isplat(0);
        for (int64_t k = 0; k < w.unit; k += 16) {
            const I code = round_to_int(load_some<Type::f32>(from + k, span.count - k) * inverse);
            sum = sum + code;
            store_codes(to + k, code, w.unit - k);
        }
        scales[s] = scale;
        sums[s] = -reduce_add(sum);
    }
}

// What a checkpoint's int8 activations would be, in float32: for weights that are not multiplied as integers.
INLINE void imitate_rounding(float* x, int64_t K) {
    const float scale = largest(x, K) / 127.0f;
    if (scale <= 1e-30f) return;
    const F inverse = splat(1.0f / scale), factor = splat(scale);
    for (int64_t k = 0; k < K; k += 16) {
        const F rounded = to_float(round_to_int(load_some<Type::f32>(x + k, K - k) * inverse)) * factor;
        store_some<Type::f32>(x + k, rounded, K - k);
    }
}

}  // namespace ISA
}  // namespace appliance
