// Quantized caches (kernels/kv_cache.py says what is stored): one head of a token to codes, and codes to numbers.
#pragma once
#include "convert.h"

namespace appliance {
namespace ISA {

constexpr float kLeastScale = 0x1p-100f;
constexpr float kMiddle = 8;      // codes of four bits are read less this
constexpr float kHalfMost = 65504;

INLINE float largest_code(Type t) { return t == Type::f8 ? 448.0f : t == Type::f8e5 ? 57344.0f : 127.0f; }

// 8 bytes of two codes each, the lower one first, less 8.
INLINE I widen_i4(const uint8_t* p) {
    I r;
#if defined(__SSE2__)
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    const __m128i each = _mm_sub_epi8(_mm_unpacklo_epi8(_mm_and_si128(b, mask), _mm_and_si128(_mm_srli_epi16(b, 4), mask)), _mm_set1_epi8(8));
#if defined(__AVX512F__)
    r.v[0] = (vi)_mm512_cvtepi8_epi32(each);
#elif defined(__AVX2__)
    r.v[0] = (vi)_mm256_cvtepi8_epi32(each);
    r.v[1] = (vi)_mm256_cvtepi8_epi32(_mm_srli_si128(each, 8));
#else
    int8_t bytes[16];
    std::memcpy(bytes, &each, 16);
    r = widen_i8(bytes);
#endif
#else
    int32_t lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = (p[i / 2] >> (i % 2 * 4) & 15) - 8;
    r = iload(lanes);
#endif
    return r;
}

// Codes d .. d + 15 of a head of `dim` features, in float32; kWhole: all are there, else what is beyond `dim` is 0. bfloat16 has all
// of them exactly.
template <Type C, bool kWhole = false> INLINE F load_codes(const uint8_t* codes, int64_t d, int64_t dim) {
    if constexpr (C == Type::i4) {
        if (kWhole || dim - d >= 16) return to_float(widen_i4(codes + d / 2));
        alignas(8) uint8_t some[8];
        std::memset(some, int(kMiddle) * 0x11, 8);
        std::memcpy(some, codes + d / 2, size_t(dim - d) / 2);
        return to_float(widen_i4(some));
    } else {
        const auto* items = reinterpret_cast<const typename As<C>::Item*>(codes) + d;
        return kWhole ? As<C>::load(items) : load_some<C>(items, dim - d);
    }
}

// The largest and smallest of x [dim]; `spoiled` is 0, or NaN where one is not finite.
struct Extent {
    float most, least, spoiled;
    INLINE Extent(const float* x, int64_t dim) {
        F high = splat(-INFINITY), low = splat(-INFINITY), zero = splat(0);
        for (int64_t k = 0; k < dim; k += 16) {
            F v = load_some<Type::f32>(x + k, dim - k);
            zero = fma(v, splat(0), zero);
            if (dim - k < 16) {  // the rest repeats the first
                float lanes[16];
                store(lanes, v);
                for (int64_t i = dim - k; i < 16; ++i) lanes[i] = x[k];
                v = load(lanes);
            }
            high = max(high, v);
            low = max(low, splat(0) - v);
        }
        most = reduce_max(high);
        least = -reduce_max(low);
        spoiled = reduce_add(zero);
    }
};

INLINE float inverse_of(float scale) { return scale < kLeastScale ? 0.0f : 1.0f / scale; }

INLINE void write_i4(uint8_t* codes, uint16_t* scales, const float* x, int64_t dim) {
    const auto half = [](float value) { return value < -kHalfMost ? -kHalfMost : value > kHalfMost ? kHalfMost : value; };
    const Extent of(x, dim);
    uint16_t stored[16];
    float rounded[16];
    float_to_f16(stored, splat(half(of.least) + of.spoiled));
    store(rounded, f16_to_float(stored));
    const float least = rounded[0], step = (of.most - least) / 15.0f;
    scales[1] = stored[0];
    float_to_f16(stored, splat(step < 0 ? 0.0f : half(step)));
    store(rounded, f16_to_float(stored));
    scales[0] = stored[0];
    const F inverse = splat(inverse_of(rounded[0])), lowest = splat(least);
    for (int64_t k = 0; k < dim; k += 16) {
        const F code = min(max((load_some<Type::f32>(x + k, dim - k) - lowest) * inverse, splat(0)), splat(15));
        uint8_t each[16];
        narrow_8(each, round_to_int(code));
        for (int64_t i = 0; i < 16 && k + i < dim; i += 2) codes[(k + i) / 2] = uint8_t(each[i] | each[i + 1] << 4);
    }
}

template <Type C> INLINE void write_scaled(uint8_t* codes, float* scales, float given, const float* x, int64_t dim) {
    const float largest = largest_code(C);
    float scale = given;
    if (given == 0) {
        const Extent of(x, dim);
        scale = (of.most > -of.least ? of.most : -of.least) / largest + of.spoiled;
    }
    *scales = scale;
    const F inverse = splat(inverse_of(scale)), most = splat(largest);
    for (int64_t k = 0; k < dim; k += 16) {
        const F code = min(max(load_some<Type::f32>(x + k, dim - k) * inverse, splat(0) - most), most);
        store_some<C>(reinterpret_cast<typename As<C>::Item*>(codes) + k, code, dim - k);
    }
}

// One head of a token: item `slot` * heads + head. `given`: the checkpoint's scale, or 0.
INLINE void write_cache(const Cache& c, void* to, void* scales, float given, int64_t item, const float* x) {
    uint8_t* at = static_cast<uint8_t*>(to) + item * c.row_bytes();
    float* scale = static_cast<float*>(scales) + item;
    if (c.type == Type::i4) write_i4(at, reinterpret_cast<uint16_t*>(scale), x, c.dim);
    else if (c.type == Type::i8) write_scaled<Type::i8>(at, scale, given, x, c.dim);
    else if (c.type == Type::f8) write_scaled<Type::f8>(at, scale, given, x, c.dim);
    else if (c.type == Type::f8e5) write_scaled<Type::f8e5>(at, scale, given, x, c.dim);
    else
        with_type(c.type, [&](auto tag) {
            constexpr Type C = decltype(tag)::value;
            for (int64_t k = 0; k < c.dim; k += 16)
                store_some<C>(reinterpret_cast<typename As<C>::Item*>(at) + k, load_some<Type::f32>(x + k, c.dim - k), c.dim - k);
        });
}

}  // namespace ISA
}  // namespace appliance
