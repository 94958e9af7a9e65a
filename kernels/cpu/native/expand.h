// Pieces of a weight on their way to a product: nibbles as bytes, or any code as float32 or as pairs of bfloat16.
//
// Twice a 4-bit float (e2m1) is an integer from -12 to 12: looked up as 0 to 24 it is a code like others, with a zero point of 12 and
// half of the scale.
#pragma once
#include "prepare.h"

namespace appliance {
namespace ISA {

constexpr int kFloatZero = 12;
alignas(16) constexpr uint8_t kFloats[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // by code

INLINE F load_scale(const Linear& w, int64_t index) {  // 16 scales from `index` on
    if (w.scale_type == Type::f16) return As<Type::f16>::load(static_cast<const uint16_t*>(w.scales) + index);
    if (w.scale_type == Type::bf16) return As<Type::bf16>::load(static_cast<const uint16_t*>(w.scales) + index);
    if (w.scale_type == Type::f8) return As<Type::f8>::load(static_cast<const uint8_t*>(w.scales) + index) * splat(0.5f);
    if (w.scale_type == Type::e8) return as_float(widen_u8(static_cast<const uint8_t*>(w.scales) + index) << 23) * splat(0.5f);
    return load(static_cast<const float*>(w.scales) + index);
}

INLINE I load_zero(const Linear& w, int64_t index) {
    return w.zeros != nullptr ? widen_u8(w.zeros + index) : isplat(w.codes == Codes::int4 ? 8 : w.codes == Codes::int8 ? 128 : kFloatZero);
}

INLINE const uint8_t* segment_data(const Linear& w, int64_t panel, int64_t segment) {
    const int64_t bytes = kPanel * w.unit / (w.four() ? 2 : 1);
    return w.data + (panel * w.segments + segment) * bytes;
}

// Four inputs of 16 outputs, a byte each, from a line of codes: of nibbles the low ones, with `half` the high ones.
template <Codes C> INLINE I bytes_of(I line, bool half) {
    if constexpr (C == Codes::int8) return line;
    const I nibbles = (half ? line >> 4 : line) & isplat(0x0f0f0f0f);
    if constexpr (C == Codes::fp4) return look_up(kFloats, nibbles);
    return nibbles;
}

// f(code), a template argument's tag.
template <Codes C> struct CodesTag { static constexpr Codes value = C; };
template <class G> INLINE void with_codes(Codes c, G&& g) {
    if (c == Codes::int4) g(CodesTag<Codes::int4>{});
    else if (c == Codes::fp4) g(CodesTag<Codes::fp4>{});
    else g(CodesTag<Codes::int8>{});
}

// Lines of nibbles (16 outputs by 8 inputs each, 4 side by side) as bytes: [inputs / 4][4][64].
INLINE void unpack_nibbles(const Linear& w, const uint8_t* from, int64_t inputs, uint8_t* to) {
    with_codes(w.codes, [&](auto tag) __attribute__((always_inline)) {
        for (int64_t k = 0; k < inputs; k += 8, from += 256, to += 512)
            for (int v = 0; v < 4; ++v) {
                const I line = iload(from + 64 * v);
                istore(to + 64 * v, bytes_of<tag.value>(line, false));
                istore(to + 256 + 64 * v, bytes_of<tag.value>(line, true));
            }
    });
}

INLINE F rounded(F x, Type to) {
    alignas(64) uint16_t bits[16];
    if (to == Type::bf16) return from_bf16(bf16_bits(x));
    if (to == Type::f16) {
        float_to_f16(bits, x);
        return f16_to_float(bits);
    }
    return x;
}

// Calls emit(k, v, a, b) with the values of the inputs k and k + 1 (k even) for the outputs 16 v .. 16 v + 15 of a panel, for all
// packed inputs first .. first + count - 1 (both even; for integers within one segment and multiples of 8).
template <class Emit> INLINE void expand(const Linear& w, int64_t panel, int64_t first, int64_t count, Emit&& emit) {
    if (is_integer(w)) {
        const int64_t segment = first / w.unit, index = (panel * w.groups() + segment / w.per_group) * kPanel;
        const int64_t inputs = w.four() ? 8 : 4;
        const uint8_t* data = segment_data(w, panel, segment) + first % w.unit / inputs * 256;
        with_codes(w.codes, [&](auto tag) __attribute__((always_inline)) {
            for (int v = 0; v < 4; ++v) {
                const F scale = load_scale(w, index + 16 * v), zero = to_float(load_zero(w, index + 16 * v));
                for (int64_t k = 0; k < count; k += inputs) {
                    const I line = iload(data + k / inputs * 256 + 64 * v);
                    for (int64_t half = 0; half < inputs; half += 4) {
                        const I bytes = bytes_of<tag.value>(line, half != 0);
                        for (int j = 0; j < 4; j += 2) {
                            const F a = (to_float((bytes >> (8 * j)) & isplat(255)) - zero) * scale;
                            const F b = (to_float((bytes >> (8 * j + 8)) & isplat(255)) - zero) * scale;
                            emit(k + half + j, v, rounded(a, w.round_to), rounded(b, w.round_to));
                        }
                    }
                }
            }
        });
        return;
    }
    for (int64_t k = 0; k < count; k += 2) {
        const int64_t at = first + k;
        const bool pair = at + 1 < w.K;
        for (int v = 0; v < 4; ++v) {
            F a, b = splat(0);
            if (w.codes == Codes::bf16) {
                const I line = iload(w.data + (panel * ((w.K + 1) / 2) + at / 2) * 256 + 64 * v);
                a = as_float(line << 16);
                b = as_float(line & isplat(int32_t(0xffff0000)));
            } else {
                const int64_t item = (panel * w.K + at) * kPanel + 16 * v;
                if (w.codes == Codes::f8) {
                    const int64_t scales = panel * w.groups() * kPanel + 16 * v;
                    a = rounded(f8_to_float<3>(w.data + item) * load_scale(w, scales + at / w.group * kPanel), w.round_to);
                    if (pair) b = rounded(f8_to_float<3>(w.data + item + kPanel) * load_scale(w, scales + (at + 1) / w.group * kPanel), w.round_to);
                } else if (w.codes == Codes::f16) {
                    a = f16_to_float(reinterpret_cast<const uint16_t*>(w.data) + item);
                    if (pair) b = f16_to_float(reinterpret_cast<const uint16_t*>(w.data) + item + kPanel);
                } else {
                    a = load(reinterpret_cast<const float*>(w.data) + item);
                    if (pair) b = load(reinterpret_cast<const float*>(w.data) + item + kPanel);
                }
            }
            emit(k, v, a, b);
        }
    }
}

// [count][64] float32.
INLINE void expand_floats(const Linear& w, int64_t panel, int64_t first, int64_t count, float* to) {
    expand(w, panel, first, count, [&](int64_t k, int v, F a, F b) {
        store(to + k * kPanel + 16 * v, a);
        store(to + (k + 1) * kPanel + 16 * v, b);
    });
}

// [count / 2][64][2] bfloat16.
INLINE void expand_pairs(const Linear& w, int64_t panel, int64_t first, int64_t count, uint16_t* to) {
    expand(w, panel, first, count, [&](int64_t k, int v, F a, F b) { istore(to + k * kPanel + 32 * v, bf16_bits(a) | (bf16_bits(b) << 16)); });
}

}  // namespace ISA
}  // namespace appliance
