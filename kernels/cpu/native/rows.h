// Rows of float weights rounded to codes while they are loaded: to the bit what quant/rows.py makes with torch, whose words they are.
#pragma once
#include <algorithm>

#include "convert.h"

namespace appliance {
namespace ISA {

// NaN's bits are above infinity's: the largest bits of magnitudes are NaN's where there is one.
INLINE I larger(I a, I b) { return select(less(a, b), b, a); }

INLINE int32_t largest(I a) {
    int32_t lanes[16];
    istore(lanes, a);
    return *std::max_element(lanes, lanes + 16);
}

INLINE float divisor(float scale) { return scale == 0 ? 1.0f : scale; }

// To the nearest integer from low to high; NaN becomes 0.
INLINE I to_code(F x, float low, float high) {
    const I code = round_to_int(min(max(x, splat(low)), splat(high)));
    return code & equal(x, x);
}

// One row to signed codes plus 128, and its scale: the largest magnitude over 127.
template <Type T> void round_row_8(const typename As<T>::Item* x, int64_t K, uint8_t* codes, float* scale) {
    I most = isplat(0);
    for (int64_t k = 0; k < K; k += 16) most = larger(most, as_int(abs(load_some<T>(x + k, K - k))));
    const int32_t bits = largest(most);
    float size;
    std::memcpy(&size, &bits, 4);
    *scale = size / 127.0f;
    const F step = splat(divisor(*scale));
    for (int64_t k = 0; k < K; k += 16) {
        uint8_t some[16];
        const int64_t count = std::min<int64_t>(16, K - k);
        narrow_8(some, to_code(load_some<T>(x + k, count) / step, -127, 127) + isplat(128));
        std::memcpy(codes + k, some, size_t(count));
    }
}

// A group of at most 32 inputs to two codes a byte, a float16 scale and a zero point, from its extremes and 0.
template <Type T> void round_group_4(const typename As<T>::Item* x, int64_t count, uint8_t* packed, uint16_t* scale, uint8_t* zero) {
    F part[2], low = splat(0), high = splat(0);
    bool numbers = true;
    for (int i = 0; i < 2; ++i) {
        part[i] = load_some<T>(x + 16 * i, count - 16 * i);
        numbers = numbers && !any(equal(part[i], part[i]) + isplat(1));
        low = min(part[i], low);
        high = max(part[i], high);
    }
    const float lowest = -reduce_max(splat(0) - low), range = numbers ? reduce_max(high) - lowest : NAN;
    uint16_t halves[16];
    float_to_f16(halves, splat(range / 15.0f));
    *scale = halves[0];
    float steps[16];
    store(steps, f16_to_float(halves));
    const F step = splat(divisor(steps[0]));
    int32_t zeros[16];
    istore(zeros, to_code(splat(-lowest) / step, 0, 15));
    *zero = uint8_t(zeros[0]);
    uint8_t codes[32] = {};
    for (int i = 0; i < 2; ++i) {
        const F exact = part[i] / step;  // within 64 of 0, or NaN
        const I code = to_code(to_float(to_code(exact, -64, 64)) + splat(float(zeros[0])), 0, 15) & equal(exact, exact);
        narrow_8(codes + 16 * i, code);
    }
    std::memset(codes + count, 0, size_t(32 - count));  // an odd last input has no neighbour
    for (int64_t i = 0; i < (count + 1) / 2; ++i) packed[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
}

inline void round_rows(const RoundArgs& args) {
    const int64_t K = args.columns, N = args.rows, groups = (K + args.group - 1) / args.group;
    with_type(args.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        const auto* x = static_cast<const typename As<T>::Item*>(args.x);
        for (int64_t n = 0; n < N; ++n, x += K) {
            if (args.bits == 8) {
                round_row_8<T>(x, K, args.codes + n * K, static_cast<float*>(args.scales) + n);
                continue;
            }
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t first = g * args.group, to = g * N + n;
                round_group_4<T>(x + first, std::min(args.group, K - first), args.codes + n * ((K + 1) / 2) + first / 2,
                                 static_cast<uint16_t*>(args.scales) + to, args.zeros + to);
            }
        }
    });
}

}  // namespace ISA
}  // namespace appliance
