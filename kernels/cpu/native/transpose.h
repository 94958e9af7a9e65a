// Sixteen vectors of sixteen 32-bit lanes, rows to columns.
#pragma once
#include "vec.h"

namespace appliance {
namespace ISA {

#if defined(__AVX512F__)
// Pairs of rows are interleaved by 32 and by 64 bits, which transposes 4 by 4 within each quarter; two shuffles of quarters do the rest.
INLINE void transpose(const I* rows, void* out, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i].v[0], (__m512i)rows[i + 1].v[0]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i].v[0], (__m512i)rows[i + 1].v[0]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {  // b[4 g + i] holds the columns i, 4 + i, 8 + i, 12 + i of the rows 4 g .. 4 g + 3
        const __m512i low0 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), high0 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        const __m512i low1 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88), high1 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        char* to = static_cast<char*>(out);
        _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(low0, low1, 0x88));
        _mm512_storeu_si512(to + (4 + i) * stride, _mm512_shuffle_i32x4(high0, high1, 0x88));
        _mm512_storeu_si512(to + (8 + i) * stride, _mm512_shuffle_i32x4(low0, low1, 0xdd));
        _mm512_storeu_si512(to + (12 + i) * stride, _mm512_shuffle_i32x4(high0, high1, 0xdd));
    }
}
#elif defined(__AVX2__)
INLINE void transpose8(const __m256i* r, char* out, int64_t stride) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride), _mm256_permute2x128_si256(b[i], b[4 + i], 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 + i) * stride), _mm256_permute2x128_si256(b[i], b[4 + i], 0x31));
    }
}
INLINE void transpose(const I* rows, void* out, int64_t stride) {
    for (int half = 0; half < 2; ++half)
        for (int part = 0; part < 2; ++part) {
            __m256i r[8];
            for (int i = 0; i < 8; ++i) r[i] = (__m256i)rows[8 * half + i].v[part];
            transpose8(r, static_cast<char*>(out) + 8 * part * stride + 32 * half, stride);
        }
}
#else
INLINE void transpose(const I* rows, void* out, int64_t stride) {
    int32_t lanes[16][16];
    for (int i = 0; i < 16; ++i) istore(lanes[i], rows[i]);
    for (int column = 0; column < 16; ++column) {
        int32_t* to = reinterpret_cast<int32_t*>(static_cast<char*>(out) + column * stride);
        for (int i = 0; i < 16; ++i) to[i] = lanes[i][column];
    }
}
#endif

}  // namespace ISA
}  // namespace appliance
