#include "pack.h"

#include <algorithm>
#include <cstring>

namespace appliance {
namespace {

int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t bytes_per_segment(const Linear& w) { return kPanel * w.unit / (w.four() ? 2 : 1); }

// The published output in a panel's lane; -1 for padding.
int64_t output_of(const Linear& w, int64_t panel, int64_t lane) {
    if (!w.gated) {
        const int64_t n = panel * kPanel + lane;
        return n < w.N ? n : -1;
    }
    const int64_t half = w.N / 2, n = panel / 2 * kPanel + lane;
    return n >= half ? -1 : panel % 2 ? half + n : n;
}

struct Segment {
    int64_t first, count;  // inputs
};

Segment segment_of(const Linear& w, int64_t s) {
    const int64_t group = s / w.per_group, first = group * w.group + s % w.per_group * kSegment;
    const int64_t end = std::min({(group + 1) * w.group, first + kSegment, w.K});
    return {first, std::max<int64_t>(0, end - first)};
}

// One output's codes of one segment as bytes.
void read_codes(const Linear& w, const uint8_t* codes, int64_t n, Segment seg, uint8_t* to) {
    if (w.codes == Codes::int8) {
        std::memcpy(to, codes + n * w.K + seg.first, size_t(seg.count));
        return;
    }
    const uint8_t* row = codes + n * ((w.K + 1) / 2);
    if (seg.first % 2 == 0) {
        const uint8_t* from = row + seg.first / 2;
        for (int64_t j = 0; j < (seg.count + 1) / 2; ++j) {  // a last odd nibble's neighbour lands in the padding, and is zeroed
            to[2 * j] = from[j] & 15;
            to[2 * j + 1] = from[j] >> 4;
        }
        if (seg.count % 2) to[seg.count] = 0;
        return;
    }
    for (int64_t j = 0; j < seg.count; ++j) {
        const int64_t k = seg.first + j;
        to[j] = k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15;
    }
}

void pack_integers(const Linear& w, const PackArgs& args, int64_t panel) {
    const bool four = w.four();
    uint8_t* out = args.to_codes + panel * w.segments * bytes_per_segment(w);
    alignas(64) uint8_t codes[kPanel][kSegment + 8];
    for (int64_t s = 0; s < w.segments; ++s, out += bytes_per_segment(w)) {
        const Segment seg = segment_of(w, s);
        std::memset(codes, 0, sizeof codes);
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            const int64_t n = output_of(w, panel, lane);
            if (n >= 0 && seg.count > 0) read_codes(w, args.codes, n, seg, codes[lane]);
        }
        if (four) {
            for (int64_t k = 0; k < w.unit; k += 8)
                for (int64_t lane = 0; lane < kPanel; ++lane) {
                    uint32_t low, high;
                    std::memcpy(&low, &codes[lane][k], 4);
                    std::memcpy(&high, &codes[lane][k + 4], 4);
                    low |= high << 4;
                    std::memcpy(out + k * kPanel / 2 + lane * 4, &low, 4);
                }
        } else {
            for (int64_t k = 0; k < w.unit; k += 4)
                for (int64_t lane = 0; lane < kPanel; ++lane) std::memcpy(out + k * kPanel + lane * 4, &codes[lane][k], 4);
        }
    }
}

template <class T> void pack_plain(const Linear& w, const PackArgs& args, int64_t panel, int64_t together) {
    const T* from = reinterpret_cast<const T*>(args.codes);
    const int64_t depth = padded(w.K, together);
    T* out = reinterpret_cast<T*>(args.to_codes) + panel * depth * kPanel;
    std::memset(out, 0, size_t(depth * kPanel) * sizeof(T));
    for (int64_t first = 0; first < w.K; first += 64)  // blocks of 64 by 64: both sides stay in the cache
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            const int64_t n = output_of(w, panel, lane);
            if (n < 0) continue;
            for (int64_t k = first; k < std::min(first + 64, w.K); ++k)
                out[(k / together * kPanel + lane) * together + k % together] = from[n * w.K + k];
        }
}

template <class T> void pack_scales(const Linear& w, const void* from, void* to, int64_t panel) {
    const T* source = static_cast<const T*>(from);
    T* out = static_cast<T*>(to) + panel * w.groups() * kPanel;
    for (int64_t g = 0; g < w.groups(); ++g)
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            const int64_t n = output_of(w, panel, lane);
            out[g * kPanel + lane] = n < 0 ? T(0) : source[g * w.N + n];
        }
}

}  // namespace

void finish(Linear& w) {
    w.panels = w.gated ? 2 * (padded(w.N / 2, kPanel) / kPanel) : padded(w.N, kPanel) / kPanel;
    w.group = std::max<int64_t>(1, std::min(w.group, w.K));
    w.per_group = (w.group + kSegment - 1) / kSegment;
    w.unit = w.group >= kSegment ? kSegment : padded(w.group, 8);
    const int64_t last = w.K - (w.groups() - 1) * w.group;
    w.segments = (w.groups() - 1) * w.per_group + (last + kSegment - 1) / kSegment;
}

int64_t code_bytes(const Linear& w) {
    const int64_t outputs = w.panels * kPanel;
    switch (w.codes) {
        case Codes::int4: case Codes::int8: case Codes::fp4: return w.panels * w.segments * bytes_per_segment(w);
        case Codes::f8: return outputs * w.K;
        case Codes::bf16: return outputs * padded(w.K, 2) * 2;
        case Codes::f16: return outputs * w.K * 2;
        case Codes::f32: return outputs * w.K * 4;
    }
    return 0;
}

void pack(Pool& pool, const Linear& w, const PackArgs& args) {
    pool.reset(w.panels);
    pool.run([&](int thread) {
        for (int64_t panel; pool.next(thread, panel);) {
            switch (w.codes) {
                case Codes::int4: case Codes::int8: case Codes::fp4: pack_integers(w, args, panel); break;
                case Codes::f8: pack_plain<uint8_t>(w, args, panel, 1); break;
                case Codes::bf16: pack_plain<uint16_t>(w, args, panel, 2); break;
                case Codes::f16: pack_plain<uint16_t>(w, args, panel, 1); break;
                case Codes::f32: pack_plain<uint32_t>(w, args, panel, 1); break;
            }
            if (args.scales != nullptr) {
                if (w.scale_type == Type::f32) pack_scales<uint32_t>(w, args.scales, args.to_scales, panel);
                else if (item_size(w.scale_type) == 1) pack_scales<uint8_t>(w, args.scales, args.to_scales, panel);
                else pack_scales<uint16_t>(w, args.scales, args.to_scales, panel);
            }
            if (args.zeros != nullptr) pack_scales<uint8_t>(w, args.zeros, args.to_zeros, panel);
        }
    });
}

}  // namespace appliance
