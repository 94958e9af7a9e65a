// Float32 lanes from and to bfloat16, float16, FP8 (e4m3fn) and int8 in memory.
#pragma once
#include "vec.h"

#define EACH for (int i = 0; i < kParts; ++i)

namespace appliance {
namespace ISA {

// The bits of bfloat16, rounded to nearest even; NaN stays NaN.
INLINE I bf16_bits(F x) {
    const I bits = as_int(x);
    const I rounded = (bits + isplat(0x7fff) + ((bits >> 16) & isplat(1))) >> 16;
    return select(equal(x, x), rounded, (bits >> 16) | isplat(0x40));
}

INLINE F from_bf16(I bits) { return as_float(bits << 16); }

INLINE F f16_to_float(const uint16_t* p) {
    F r;
#if defined(__AVX512F__)
    r.v[0] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    EACH r.v[i] = (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * 8)));
#else
    // Exponent and mantissa move up by 13 bits; the exponent's bias grows by 112, which a product does also for subnormals.
    const I bits = widen_u16(p);
    const I sign = (bits & isplat(0x8000)) << 16, rest = (bits & isplat(0x7fff)) << 13;
    const F value = as_float(rest) * as_float(isplat(0x77800000));  // 2^112
    const I special = less(isplat(0x0f7fffff), rest);               // infinity and NaN
    r = as_float(sign | select(special, rest | isplat(0x7f800000), as_int(value)));
#endif
    return r;
}

INLINE void float_to_f16(uint16_t* p, F x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    EACH _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * 8), _mm256_cvtps_ph((__m256)x.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const I bits = as_int(x), sign = (bits >> 16) & isplat(0x8000), rest = bits & isplat(0x7fffffff);
    const I normal = (rest - isplat(112 << 23) + isplat(0xfff) + ((rest >> 13) & isplat(1))) >> 13;
    // Below 2^-14: adding 2^-1 leaves the subnormal's bits, rounded, at the end of the mantissa.
    F sum = as_float(rest) + splat(0.5f);
    asm("" : "+m"(sum));
    const I small = as_int(sum) - isplat(0x3f000000);
    const I big = select(less(isplat(0x7f800000), rest), isplat(0x7e00), isplat(0x7c00));
    I r = select(less(rest, isplat(113 << 23)), small, normal);
    r = select(less(isplat(0x477fefff), rest), big, r);
    narrow_u16(p, r | sign);
#endif
}

// e4m3fn: the bits, shifted, are a float times 2^-120; the two NaNs come out as 480.
INLINE F f8_to_float(const uint8_t* p) {
    const I bits = widen_u8(p);
    return as_float(((bits & isplat(0x80)) << 24) | ((bits & isplat(0x7f)) << 20)) * as_float(isplat(0x7b800000));
}

// Saturating at 448; ties to even.
INLINE void float_to_f8(uint8_t* p, F x) {
    const I sign = (as_int(x) >> 24) & isplat(0x80);
    const F size = min(abs(x), splat(448.0f));
    const I rest = as_int(size);
    const I normal = (rest - isplat(120 << 23) + isplat(0x7ffff) + ((rest >> 20) & isplat(1))) >> 20;
    const I small = round_to_int(size * splat(512.0f));  // below 2^-6 the step is 2^-9
    I r = select(less(size, splat(0.015625f)), small, normal);
    r = select(equal(x, x), r, isplat(0x7f)) | sign;
    EACH {
        const vub4 b = __builtin_convertvector(r.v[i], vub4);
        std::memcpy(p + i * kWidth, &b, kWidth);
    }
}

template <Type T> struct As;
template <> struct As<Type::f32> {
    using Item = float;
    static INLINE F load(const Item* p) { return ISA::load(p); }
    static INLINE void store(Item* p, F x) { ISA::store(p, x); }
};
template <> struct As<Type::bf16> {
    using Item = uint16_t;
    static INLINE F load(const Item* p) { return from_bf16(widen_u16(p)); }
    static INLINE void store(Item* p, F x) {
#if defined(__AVX512BF16__)
        const __m256bh b = _mm512_cvtneps_pbh((__m512)x.v[0]);
        std::memcpy(p, &b, 32);
#else
        narrow_u16(p, bf16_bits(x));
#endif
    }
};
template <> struct As<Type::f16> {
    using Item = uint16_t;
    static INLINE F load(const Item* p) { return f16_to_float(p); }
    static INLINE void store(Item* p, F x) { float_to_f16(p, x); }
};
template <> struct As<Type::f8> {
    using Item = uint8_t;
    static INLINE F load(const Item* p) { return f8_to_float(p); }
    static INLINE void store(Item* p, F x) { float_to_f8(p, x); }
};
template <> struct As<Type::i8> {
    using Item = int8_t;
    static INLINE F load(const Item* p) { return to_float(widen_i8(p)); }
    static INLINE void store(Item* p, F x) { narrow_i8(p, round_to_int(x)); }
};

// n <= 16 items; the other lanes are 0 (load) or left alone (store).
template <Type T> INLINE F load_some(const typename As<T>::Item* p, int64_t n) {
    if (n >= 16) return As<T>::load(p);
    typename As<T>::Item items[16] = {};
    if (n > 0) std::memcpy(items, p, size_t(n) * sizeof items[0]);
    return As<T>::load(items);
}
template <Type T> INLINE void store_some(typename As<T>::Item* p, F x, int64_t n) {
    if (n >= 16) return As<T>::store(p, x);
    typename As<T>::Item items[16];
    As<T>::store(items, x);
    if (n > 0) std::memcpy(p, items, size_t(n) * sizeof items[0]);
}

// One of the three types of activations, as a template argument: with_type(t, [&](auto tag) { constexpr Type T = tag.value; ... }).
template <Type T> struct Tag { static constexpr Type value = T; };
template <class G> INLINE void with_type(Type t, G&& g) {
    if (t == Type::f32) g(Tag<Type::f32>{});
    else if (t == Type::bf16) g(Tag<Type::bf16>{});
    else g(Tag<Type::f16>{});
}

}  // namespace ISA
}  // namespace appliance

#undef EACH
