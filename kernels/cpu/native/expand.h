// Pieces of a weight on their way to a product: nibbles as bytes, or any code as float32 or as pairs of bfloat16.
#pragma once
#include "prepare.h"

namespace appliance {
namespace ISA {

INLINE F load_scale(const Linear& w, int64_t index) {  // 16 scales from `index` on
    if (w.scale_type == Type::f16) return As<Type::f16>::load(static_cast<const uint16_t*>(w.scales) + index);
    if (w.scale_type == Type::bf16) return As<Type::bf16>::load(static_cast<const uint16_t*>(w.scales) + index);
    return load(static_cast<const float*>(w.scales) + index);
}

INLINE I load_zero(const Linear& w, int64_t index) {
    return w.zeros != nullptr ? widen_u8(w.zeros + index) : isplat(w.codes == Codes::int4 ? 8 : 128);
}

INLINE const uint8_t* segment_data(const Linear& w, int64_t panel, int64_t segment) {
    const int64_t bytes = kPanel * w.unit / (w.codes == Codes::int4 ? 2 : 1);
    return w.data + (panel * w.segments + segment) * bytes;
}

// `lines` lines of nibbles (16 outputs by 8 inputs each, 4 side by side) as bytes: [inputs / 4][4][64].
INLINE void unpack_nibbles(const uint8_t* from, int64_t inputs, uint8_t* to) {
    const I mask = isplat(0x0f0f0f0f);
    for (int64_t k = 0; k < inputs; k += 8, from += 256, to += 512)
        for (int v = 0; v < 4; ++v) {
            const I line = iload(from + 64 * v);
            istore(to + 64 * v, line & mask);
            istore(to + 256 + 64 * v, (line >> 4) & mask);
        }
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
        const bool four = w.codes == Codes::int4;
        const int64_t inputs = four ? 8 : 4;
        const I mask = isplat(four ? 15 : 255);
        const uint8_t* data = segment_data(w, panel, segment) + first % w.unit / inputs * 256;
        for (int v = 0; v < 4; ++v) {
            const F scale = load_scale(w, index + 16 * v), zero = to_float(load_zero(w, index + 16 * v));
            for (int64_t k = 0; k < count; k += inputs) {
                const I line = iload(data + k / inputs * 256 + 64 * v);
                for (int64_t j = 0; j < inputs; j += 2) {
                    // Nibbles: bytes 0 to 3 hold the inputs 0 to 3 low and 4 to 7 high.
                    const int shift = int(four ? j % 4 * 8 + j / 4 * 4 : j * 8);
                    const F a = (to_float((line >> shift) & mask) - zero) * scale;
                    const F b = (to_float((line >> (shift + 8)) & mask) - zero) * scale;
                    emit(k + j, v, rounded(a, w.round_to), rounded(b, w.round_to));
                }
            }
        }
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
