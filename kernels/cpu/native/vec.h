// Sixteen lanes, whatever the machine: F (float32), I (int32, or 64 bytes as 16 groups of four). Compiled once per instruction set.
//
// Arithmetic is the compiler's vector extension; only what it cannot say (dot products of bytes, half-precision conversions) is
// written with intrinsics. Conversions are in convert.h. Everything is inlined: nothing compiled for a newer processor may be linked into code for an older one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace appliance {
namespace ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kParts = 64 / kBytes;
constexpr int kWidth = kBytes / 4;  // lanes of one part

typedef float vf __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));

struct F { vf v[kParts]; };
struct I { vi v[kParts]; };

#define EACH for (int i = 0; i < kParts; ++i)

INLINE F splat(float x) { F r; EACH r.v[i] = x - vf{}; return r; }
INLINE I isplat(int32_t x) { I r; EACH r.v[i] = x - vi{}; return r; }
INLINE F load(const float* p) { F r; EACH std::memcpy(&r.v[i], p + i * kWidth, kBytes); return r; }
INLINE void store(float* p, F x) { EACH std::memcpy(p + i * kWidth, &x.v[i], kBytes); }
INLINE I iload(const void* p) { I r; EACH std::memcpy(&r.v[i], static_cast<const char*>(p) + i * kBytes, kBytes); return r; }
INLINE void istore(void* p, I x) { EACH std::memcpy(static_cast<char*>(p) + i * kBytes, &x.v[i], kBytes); }
INLINE F operator+(F a, F b) { F r; EACH r.v[i] = a.v[i] + b.v[i]; return r; }
INLINE F operator-(F a, F b) { F r; EACH r.v[i] = a.v[i] - b.v[i]; return r; }
INLINE F operator*(F a, F b) { F r; EACH r.v[i] = a.v[i] * b.v[i]; return r; }
INLINE F operator/(F a, F b) { F r; EACH r.v[i] = a.v[i] / b.v[i]; return r; }
INLINE F fma(F a, F b, F c) { F r; EACH r.v[i] = a.v[i] * b.v[i] + c.v[i]; return r; }
// b where one of them is NaN, as the processors have it: GCC needs telling.
#if defined(__AVX512F__)
INLINE F max(F a, F b) { return {{(vf)_mm512_max_ps((__m512)a.v[0], (__m512)b.v[0])}}; }
INLINE F min(F a, F b) { return {{(vf)_mm512_min_ps((__m512)a.v[0], (__m512)b.v[0])}}; }
#elif defined(__AVX2__)
INLINE F max(F a, F b) { F r; EACH r.v[i] = (vf)_mm256_max_ps((__m256)a.v[i], (__m256)b.v[i]); return r; }
INLINE F min(F a, F b) { F r; EACH r.v[i] = (vf)_mm256_min_ps((__m256)a.v[i], (__m256)b.v[i]); return r; }
#else
INLINE F max(F a, F b) { F r; EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
INLINE F min(F a, F b) { F r; EACH r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return r; }
#endif
INLINE I operator+(I a, I b) { I r; EACH r.v[i] = a.v[i] + b.v[i]; return r; }
INLINE I operator-(I a, I b) { I r; EACH r.v[i] = a.v[i] - b.v[i]; return r; }
INLINE I operator&(I a, I b) { I r; EACH r.v[i] = a.v[i] & b.v[i]; return r; }
INLINE I operator|(I a, I b) { I r; EACH r.v[i] = a.v[i] | b.v[i]; return r; }
INLINE I operator<<(I a, int n) { I r; EACH r.v[i] = a.v[i] << n; return r; }
INLINE I operator>>(I a, int n) { I r; EACH r.v[i] = (vi)((vu)a.v[i] >> n); return r; }  // logical
INLINE F as_float(I a) { F r; EACH r.v[i] = (vf)a.v[i]; return r; }
INLINE I as_int(F a) { I r; EACH r.v[i] = (vi)a.v[i]; return r; }
INLINE F to_float(I a) { F r; EACH r.v[i] = __builtin_convertvector(a.v[i], vf); return r; }
INLINE F abs(F a) { return as_float(as_int(a) & isplat(0x7fffffff)); }

// To the nearest integer, ties to even; |a| < 2^22.
INLINE I round_to_int(F a) {
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: its last mantissa bit is worth 1
    return as_int(a + magic) - isplat(0x4b400000);
}

INLINE float reduce_add(F a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a.v[0]);
#else
    float lanes[16];
    store(lanes, a);
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    return lanes[0];
#endif
}

INLINE float reduce_max(F a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a.v[0]);
#else
    float lanes[16];
    store(lanes, a);
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
#endif
}

INLINE int32_t reduce_add(I a) {
    int32_t lanes[16], s = 0;
    istore(lanes, a);
    for (int i = 0; i < 16; ++i) s += lanes[i];
    return s;
}

// acc += sum of four products of unsigned bytes `u` and signed bytes `s`, lane by lane. Codes of 4 bits need no more than 16 bits
// on the way; kWide says that `u` may exceed 127.
template <bool kWide> INLINE I dot4(I acc, I u, I s) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v[0]) : "v"(u.v[0]), "v"(s.v[0]));
#elif defined(__AVXVNNI__)
    EACH asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.v[i]) : "x"(u.v[i]), "x"(s.v[i]));
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1);
    EACH {
        const __m256i a = (__m256i)u.v[i], b = (__m256i)s.v[i];
        if (kWide) {
            const __m256i low = _mm256_set1_epi16(0xff);
            const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
            const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
            acc.v[i] += (vi)even + (vi)odd;
        } else {
            acc.v[i] += (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones);
        }
    }
#elif defined(__SSE2__)
    EACH {
        const __m128i a = (__m128i)u.v[i], b = (__m128i)s.v[i];
        const __m128i even = _mm_madd_epi16(_mm_and_si128(a, _mm_set1_epi16(0xff)), _mm_srai_epi16(_mm_slli_epi16(b, 8), 8));
        const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(a, 8), _mm_srai_epi16(b, 8));
        acc.v[i] += (vi)even + (vi)odd;
    }
#else
    EACH for (int j = 0; j < 4; ++j) {
        const vi a = (vi)(((vu)u.v[i] >> (8 * j)) & 0xff), b = (vi)((vu)s.v[i] << (24 - 8 * j)) >> 24;
        acc.v[i] += a * b;
    }
#endif
    return acc;
}

#if defined(__AVX512BF16__)
// acc += products of pairs of bfloat16, lane by lane.
INLINE F dot2(F acc, I a, I b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v[0]) : "v"(a.v[0]), "v"(b.v[0]));
    return acc;
}
#endif

// Products of small integers: the low 16 bits of each lane of a (not negative) and of b, signed.
INLINE I mul16(I a, I b) {
    I r;
#if defined(__AVX512BW__)
    r.v[0] = (vi)_mm512_madd_epi16((__m512i)a.v[0], (__m512i)b.v[0]);
#elif defined(__AVX2__)
    EACH r.v[i] = (vi)_mm256_madd_epi16((__m256i)a.v[i], (__m256i)b.v[i]);
#else
    EACH r.v[i] = a.v[i] * ((vi)((vu)b.v[i] << 16) >> 16);
#endif
    return r;
}

// 16 small integers in memory from and to lanes, of which the lower bits are stored. GCC 12 makes a hundred instructions of
// __builtin_convertvector between bytes and lanes: what processors have for it is asked for by name.
#if defined(__AVX512F__)
INLINE I widen_u8(const uint8_t* p) { return {{(vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}}; }
INLINE I widen_i8(const int8_t* p) { return {{(vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}}; }
INLINE I widen_u16(const uint16_t* p) { return {{(vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}}; }
INLINE void narrow_8(void* p, I x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x.v[0])); }
INLINE void narrow_u16(uint16_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x.v[0])); }
#elif defined(__AVX2__)
INLINE __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
INLINE I widen_u8(const uint8_t* p) { return {{(vi)_mm256_cvtepu8_epi32(load8(p)), (vi)_mm256_cvtepu8_epi32(load8(p + 8))}}; }
INLINE I widen_i8(const int8_t* p) { return {{(vi)_mm256_cvtepi8_epi32(load8(p)), (vi)_mm256_cvtepi8_epi32(load8(p + 8))}}; }
INLINE I widen_u16(const uint16_t* p) {
    const __m128i* from = reinterpret_cast<const __m128i*>(p);
    return {{(vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1))}};
}
INLINE __m256i pack_u16(I x) {
    const __m256i packed = _mm256_packus_epi32((__m256i)(x.v[0] & 0xffff), (__m256i)(x.v[1] & 0xffff));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
INLINE void narrow_8(void* p, I x) {
    const __m256i halves = pack_u16(x & isplat(0xff));
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
INLINE void narrow_u16(uint16_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_u16(x)); }
#else
template <class Narrow> INLINE I widen_all(const void* p) {
    typedef Narrow part __attribute__((vector_size(kWidth * sizeof(Narrow))));
    I r;
    EACH {
        part narrow;
        std::memcpy(&narrow, static_cast<const char*>(p) + i * sizeof narrow, sizeof narrow);
        r.v[i] = __builtin_convertvector(narrow, vi);
    }
    return r;
}
INLINE I widen_u8(const uint8_t* p) { return widen_all<uint8_t>(p); }
INLINE I widen_i8(const int8_t* p) { return widen_all<int8_t>(p); }
INLINE I widen_u16(const uint16_t* p) { return widen_all<uint16_t>(p); }
template <class Narrow> INLINE void narrow_all(void* p, I x) {
    typedef Narrow part __attribute__((vector_size(kWidth * sizeof(Narrow))));
    EACH {
        const part narrow = __builtin_convertvector(x.v[i], part);
        std::memcpy(static_cast<char*>(p) + i * sizeof narrow, &narrow, sizeof narrow);
    }
}
INLINE void narrow_8(void* p, I x) { narrow_all<uint8_t>(p, x); }
INLINE void narrow_u16(uint16_t* p, I x) { narrow_all<uint16_t>(p, x); }
#endif

// What a table of 16 bytes (aligned) has for each byte; these are below 16.
INLINE I look_up(const uint8_t* table, I bytes) {
    I r;
#if defined(__AVX512BW__)
    const __m512i each = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    r.v[0] = (vi)_mm512_shuffle_epi8(each, (__m512i)bytes.v[0]);
#elif defined(__AVX2__)
    const __m256i each = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    EACH r.v[i] = (vi)_mm256_shuffle_epi8(each, (__m256i)bytes.v[i]);
#else
    uint8_t items[64];
    istore(items, bytes);
    for (uint8_t& item : items) item = table[item];
    r = iload(items);
#endif
    return r;
}

INLINE I select(I mask, I a, I b) { I r; EACH r.v[i] = (mask.v[i] & a.v[i]) | (~mask.v[i] & b.v[i]); return r; }
INLINE F select(I mask, F a, F b) { return as_float(select(mask, as_int(a), as_int(b))); }
INLINE I less(I a, I b) { I r; EACH r.v[i] = (vi)(a.v[i] < b.v[i]); return r; }
INLINE I less(F a, F b) { I r; EACH r.v[i] = (vi)(a.v[i] < b.v[i]); return r; }
INLINE I equal(F a, F b) { I r; EACH r.v[i] = (vi)(a.v[i] == b.v[i]); return r; }

// Whether any lane of a comparison is true.
INLINE bool any(I mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask.v[0], (__m512i)mask.v[0]) != 0;
#else
    vi all = mask.v[0];
    for (int i = 1; i < kParts; ++i) all |= mask.v[i];
    int64_t parts[kBytes / 8], found = 0;
    std::memcpy(parts, &all, kBytes);
    for (int i = 0; i < kBytes / 8; ++i) found |= parts[i];
    return found != 0;
#endif
}

// e^x to 2 units in the last place for x in [-87, 88]; below, 0; above, what 88 gives (3.3.4 of Cody and Waite's scheme:
// x = n ln 2 + r, a polynomial for e^r, n added to the exponent).
INLINE F exp(F x) {
    const F lowest = splat(-87.0f), c = min(max(x, lowest), splat(88.0f));
    const I n = round_to_int(c * splat(1.44269504f));
    const F k = to_float(n);
    const F r = fma(k, splat(2.12194440e-4f), fma(k, splat(-0.693359375f), c));
    F p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    const F y = fma(p * r, r, r + splat(1.0f)) * as_float((n + isplat(127)) << 23);
    return select(less(x, lowest), splat(0.0f), y);
}

// 2^x for x <= 0, 0 below -126; to 2 units in the last place (the polynomial of the Cephes library's exp2f).
INLINE F exp2(F x) {
    const F lowest = splat(-126.0f), c = max(x, lowest);
#if defined(__AVX512F__)
    const F whole = {{(vf)_mm512_roundscale_ps((__m512)c.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}};
#else
    const I n = round_to_int(c);
    const F whole = to_float(n);
#endif
    const F r = c - whole;
    F p = splat(1.535336188319500e-4f);
    p = fma(p, r, splat(1.339887440266574e-3f));
    p = fma(p, r, splat(9.618437357674640e-3f));
    p = fma(p, r, splat(5.550332471162809e-2f));
    p = fma(p, r, splat(2.402264791363012e-1f));
    p = fma(p, r, splat(6.931472028550421e-1f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return {{(vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x.v[0], (__m512)lowest.v[0], _CMP_GE_OQ), (__m512)p.v[0], (__m512)whole.v[0])}};
#else
    return select(less(x, lowest), splat(0.0f), p * as_float((n + isplat(127)) << 23));
#endif
}

INLINE F silu(F x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

// x * (1 + tanh(u)) / 2 for u = sqrt(2 / pi) * (x + 0.044715 x^3): the same as x / (1 + e^-2u).
INLINE F gelu(F x) { return x / (splat(1.0f) + exp(x * fma(x * x, splat(-0.0713548163f), splat(-1.59576912f)))); }

template <bool kGelu> INLINE F gate(F x) {
    if constexpr (kGelu) return gelu(x);
    else return silu(x);
}

// gpt-oss: (u + 1) * g * sigmoid(slope * g), g at most `limit`, and u within it. NaN stays NaN.
INLINE F clamped(F gate, F up, float limit, float slope) {
    const F most = splat(limit), g = min(most, gate), u = max(splat(-limit), min(most, up));
    return g / (splat(1.0f) + exp(g * splat(-slope))) * (u + splat(1.0f));
}

INLINE F tanh(F x) { return splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp(x + x)); }

#undef EACH

}  // namespace ISA
}  // namespace appliance
