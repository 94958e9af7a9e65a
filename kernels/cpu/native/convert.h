// Float32 lanes from and to bfloat16, float16, FP8 (e4m3fn, e5m2) and int8 in memory.
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

// FP8 moved up into a float16: e5m2 is its upper half, and e4m3fn is worth 2^8 there. The NaNs of e4m3fn come out as 480.
template <int kMantissa> INLINE F f8_to_float(const uint8_t* p) {
    constexpr int kUp = 10 - kMantissa;
    [[maybe_unused]] constexpr short kKept = short(kMantissa == 3 ? 0xbf80 : 0xff00);  // a sign that was widened is in two bits
    F r;
#if defined(__AVX512F__)
    const __m256i bits = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    r.v[0] = (vf)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(bits, kUp), _mm256_set1_epi16(kKept)));
#elif defined(__AVX2__)
    EACH {
        const __m128i bits = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * 8)));
        r.v[i] = (vf)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(bits, kUp), _mm_set1_epi16(kKept)));
    }
#else
    uint16_t halves[16];
    for (int i = 0; i < 16; ++i) halves[i] = uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << kUp);
    r = f16_to_float(halves);
#endif
    return kMantissa == 3 ? r * splat(256) : r;
}

// With so many bits of mantissa and this bias of the exponent; saturating at `most`; ties to even.
template <int kMantissa, int kBias> INLINE void float_to_f8(uint8_t* p, F x, float most) {
    constexpr int kCut = 23 - kMantissa, kLeast = 1 - kBias;  // normal from 2^kLeast on, below in steps of 2^(kLeast - kMantissa)
    const I sign = (as_int(x) >> 24) & isplat(0x80);
    const F size = min(abs(x), splat(most));
    const I rest = as_int(size);
    const I normal = (rest - isplat((127 - kBias) << 23) + isplat((1 << (kCut - 1)) - 1) + ((rest >> kCut) & isplat(1))) >> kCut;
    const I small = round_to_int(size * as_float(isplat((127 - kLeast + kMantissa) << 23)));
    I r = select(less(size, as_float(isplat((127 + kLeast) << 23))), small, normal);
    r = select(equal(x, x), r, isplat(0x7f)) | sign;
    narrow_8(p, r);
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
    static INLINE F load(const Item* p) { return f8_to_float<3>(p); }
    static INLINE void store(Item* p, F x) { float_to_f8<3, 7>(p, x, 448.0f); }
};
template <> struct As<Type::f8e5> {
    using Item = uint8_t;
    static INLINE F load(const Item* p) { return f8_to_float<2>(p); }
    static INLINE void store(Item* p, F x) { float_to_f8<2, 15>(p, x, 57344.0f); }
};
template <> struct As<Type::i8> {
    using Item = int8_t;
    static INLINE F load(const Item* p) { return to_float(widen_i8(p)); }
    static INLINE void store(Item* p, F x) { narrow_8(p, round_to_int(x)); }
};

template <> struct As<Type::i4> {
    using Item = uint8_t;  // two of them
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

// The types of caches, in the same way.
template <Type T> struct Tag { static constexpr Type value = T; };
template <class G> INLINE void with_cache(Type t, G&& g) {
    switch (t) {
        case Type::f32: return g(Tag<Type::f32>{});
        case Type::bf16: return g(Tag<Type::bf16>{});
        case Type::f16: return g(Tag<Type::f16>{});
        case Type::f8: return g(Tag<Type::f8>{});
        case Type::f8e5: return g(Tag<Type::f8e5>{});
        case Type::i8: return g(Tag<Type::i8>{});
        case Type::i4: return g(Tag<Type::i4>{});
        case Type::e8: return;  // of scales alone
    }
}

// One of the three types of activations, as a template argument: with_type(t, [&](auto tag) { constexpr Type T = tag.value; ... }).
template <class G> INLINE void with_type(Type t, G&& g) {
    if (t == Type::f32) g(Tag<Type::f32>{});
    else if (t == Type::bf16) g(Tag<Type::bf16>{});
    else g(Tag<Type::f16>{});
}

}  // namespace ISA
}  // namespace appliance

#undef EACH
