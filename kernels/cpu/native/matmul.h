// Products with packed weights: activations prepared by all threads, then panels of 64 outputs handed out to them.
//
// Up to kBlock rows at a time. A thread accumulates a panel for all those rows in float32 (in its part of the L2 cache), a few
// segments of the weight at a time (unpacked in its L1 cache when many rows use them), and then applies bias, gate and residual.
#pragma once
#include "added.h"
#include "amx.h"
#include "pool.h"
#include "tiles.h"

namespace appliance {
namespace ISA {

constexpr int64_t kBlock = 512;         // rows
constexpr int64_t kInputs = 64;         // inputs expanded to floats at a time: 16 KiB
// Up to so many rows nibbles are unpacked in registers, once for every 6 rows. With 16 registers an accumulator for each of a line's
// outputs leaves room for few rows only, and a line would be unpacked again for each 16 outputs.
#if defined(__AVX512F__)
constexpr int64_t kDirect = 2 * kRows;
#else
constexpr int64_t kDirect = 2;
#endif

struct Block {
    const MatmulArgs* a;
    int64_t first, rows;     // rows of x
    Rounded rounded;
    float* floats;           // or float32 in `chunks`
    uint16_t* pairs;         // or bfloat16
    Chunks chunks;
    Between between{};       // of what is added
};

// Segments whose codes are unpacked at a time: 16 KiB.
INLINE int64_t segments_at_once(const Linear& w) { return 2 * kSegment / w.unit; }

// Few rows of an integer weight that is not rounded once expanded: no need to write its floats down.
INLINE bool expands_in_registers(const MatmulArgs& a) {
    return !a.weight->quantize && is_integer(*a.weight) && a.rows <= kRows && a.type != Type::f32;
}

// Inputs in a chunk of prepared rows.
INLINE int64_t chunk_inputs(const MatmulArgs& a) {
    const Linear& w = *a.weight;
    if (expands_in_registers(a)) return w.unit;
    if (w.quantize) return segments_at_once(w) * w.unit;
    if (!is_integer(w)) return kInputs;
    return w.unit <= kInputs ? w.unit : w.unit % kInputs == 0 ? kInputs : 8;  // within one segment
}

INLINE bool as_pairs(const MatmulArgs& a) {
#if defined(__AVX512BF16__)
    return !a.weight->quantize && a.type == Type::bf16 && a.weight->codes != Codes::f32 && !expands_in_registers(a);
#else
    (void)a;
    return false;
#endif
}

INLINE void prepare_row(const Block& b, int64_t row, float* wide, float* spare) {
    const Linear& w = *b.a->weight;
    widen_row(*b.a, b.first + row, wide, spare);
    if (w.quantize) return round_row(w, wide, b.rounded, row);
    if (w.per_token) imitate_rounding(wide, w.K);
    const bool integer = is_integer(w);
    for (int64_t s = 0; s < (integer ? w.segments : 1); ++s) {
        const Span span = integer ? span_of(w, s) : Span{0, w.K};
        const int64_t width = integer ? w.unit : depth(w), inputs = b.chunks.inputs;
        for (int64_t first = 0; first < width; first += inputs) {
            const int64_t at = b.chunks.at(row, s * w.unit * integer + first), n = width - first < inputs ? width - first : inputs;
            for (int64_t k = 0; k < n; k += 16) {
                const F x = load_some<Type::f32>(wide + span.first + first + k, span.count - first - k);
                if (b.pairs != nullptr) store_some<Type::bf16>(b.pairs + at + k, x, n - k);
                else store_some<Type::f32>(b.floats + at + k, x, n - k);
            }
        }
    }
}

// f(row, rows) over even tiles of at most kRows rows.
template <class G> INLINE void each_tile(int64_t rows, G&& g) {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
        g(from, to - from);
    }
}

INLINE void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

INLINE void accumulate_integers(const Block& b, int64_t panel, int v0, int v1, uint8_t* scratch, float* c) {
    const Linear& w = *b.a->weight;
#if defined(HAVE_TILES)
    if (use_tiles(w, b.rows) && v0 == 0 && v1 == 4) return tile_integers(w, b.rounded, b.rows, panel, scratch, c);
#endif
    const bool direct = b.rows <= (w.four() ? kDirect : kRows);
    const int64_t chunk = direct ? w.segments : segments_at_once(w);
    for (int64_t first = 0; first < w.segments; first += chunk) {
        const int64_t last = first + chunk < w.segments ? first + chunk : w.segments;
        const uint8_t* bytes = nullptr;
        if (!direct && w.four()) {
            unpack_nibbles(w, segment_data(w, panel, first), (last - first) * w.unit, scratch);
            bytes = scratch;
        }
        // The next piece of the weight comes from memory while this one is multiplied.
        const int64_t piece = chunk * w.unit * kPanel / (w.four() ? 2 : 1);
        const uint8_t* following = segment_data(w, panel, last < w.segments ? last : first);
        each_tile(b.rows, [&](int64_t row, int64_t rows) {
            if (!direct) prefetch(following + piece * row / b.rows, piece * rows / b.rows);
            with_shape(rows, v1 - v0, [&](auto r, auto v) { dot_rows<r.value, v.value>(w, panel, first, last, v0, v1, bytes, b.rounded, row, c + row * kPanel); });
        });
    }
}

INLINE void accumulate_floats(const Block& b, int64_t panel, int v0, int v1, uint8_t* scratch, float* c) {
    const Linear& w = *b.a->weight;
    if (expands_in_registers(*b.a)) {
        for (int64_t s = 0; s < w.segments; ++s)
            with_shape(b.rows, v1 - v0, [&](auto r, auto v) { fma_direct<r.value, v.value>(w, panel, s, v0, v1, b.floats + b.chunks.at(0, s * w.unit), w.unit, c); });
        return;
    }
    const int64_t all = depth(w), step = b.chunks.inputs;
    for (int64_t first = 0; first < all; first += step) {
        const int64_t count = first + step < all ? step : all - first;
#if defined(__AVX512BF16__)
        if (b.pairs != nullptr) {
            const uint16_t* pairs = reinterpret_cast<uint16_t*>(scratch);
            if (w.codes == Codes::bf16) pairs = reinterpret_cast<const uint16_t*>(w.data) + (panel * all + first) * kPanel;
            else expand_pairs(w, panel, first, count, reinterpret_cast<uint16_t*>(scratch));
#if defined(HAVE_TILES)
            if (count == kInputs && use_tiles(w, b.rows) && v0 == 0 && v1 == 4) {
                tile_pairs(pairs, b.pairs + b.chunks.at(0, first), step, b.rows, c);
                continue;
            }
#endif
            each_tile(b.rows, [&](int64_t row, int64_t rows) {
                with_shape(rows, v1 - v0, [&](auto r, auto v) { pair_rows<r.value, v.value>(pairs, count, v0, v1, b.pairs + b.chunks.at(row, first), step, c + row * kPanel); });
            });
            continue;
        }
#endif
        float* floats = reinterpret_cast<float*>(scratch);
        expand_floats(w, panel, first, count, floats);
        each_tile(b.rows, [&](int64_t row, int64_t rows) {
            with_shape(rows, v1 - v0, [&](auto r, auto v) { fma_rows<r.value, v.value>(floats, count, v0, v1, b.floats + b.chunks.at(row, first), step, c + row * kPanel); });
        });
    }
}

// Bias, gate, residual, and out. `up` is null where the weight is not gated. Columns 16 v0 .. 16 v1 - 1 of the panel.
enum class Gate { silu, gelu, clamp };

template <Gate kGate> INLINE void finish_panel(const Block& b, int64_t panel, int v0, int v1, const float* c, const float* up) {
    const MatmulArgs& a = *b.a;
    const Linear& w = *a.weight;
    const int64_t outputs = w.outputs(), column = (up != nullptr ? panel / 2 : panel) * kPanel;
    with_type(a.out_type, [&](auto out_tag) {
        constexpr Type O = decltype(out_tag)::value;
        with_type(a.type, [&](auto tag) {
            constexpr Type T = decltype(tag)::value;
            for (int64_t row = 0; row < b.rows; ++row)
                for (int v = v0; v < v1; ++v) {
                    const int64_t at = column + 16 * v, left = outputs - at;
                    if (left <= 0) break;
                    F y = load(c + row * kPanel + 16 * v);
                    if (w.bias != nullptr) y = y + load(w.bias + panel * kPanel + 16 * v);
                    if (up != nullptr) {
                        F u = load(up + row * kPanel + 16 * v);
                        if (w.bias != nullptr) u = u + load(w.bias + (panel + 1) * kPanel + 16 * v);
                        if constexpr (kGate == Gate::clamp) y = clamped(y, u, w.limit, w.slope);
                        else y = gate<kGate == Gate::gelu>(y) * u;
                    }
                    const int64_t index = (b.first + row) * outputs + at;
                    if (a.residual != nullptr) y = y + load_some<T>(static_cast<const typename As<T>::Item*>(a.residual) + index, left);
                    store_some<O>(static_cast<typename As<O>::Item*>(a.out) + index, y, left);
                }
        });
    });
}

INLINE void zero(float* c, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store(c + i, splat(0));
}

struct Sizes {
    int64_t wide, c, scratch;  // bytes of a thread's parts
    int64_t rows, row;         // prepared rows, and bytes of one
    explicit Sizes(const MatmulArgs& a) {
        const Linear& w = *a.weight;
        rows = (a.rows < kBlock ? a.rows + 15 : kBlock) / 16 * 16;  // tiles read and write whole
        wide = (w.K + 32) * 8;
        c = rows * kPanel * 4 * (w.gated ? 2 : 1);
        scratch = 32768;
        const int64_t inputs = chunk_inputs(a), all = (depth(w) + inputs - 1) / inputs * inputs;
        row = all * (w.quantize ? 1 : as_pairs(a) ? 2 : 4);
    }
    int64_t thread() const { return (wide + 63) / 64 * 64 + c + scratch; }
    int64_t shared(const Linear& w) const { return (rows * (row + (w.quantize ? w.segments * 8 : 0)) + 127) / 64 * 64; }
};

// A thread's memory.
struct Desk {
    float *wide, *spare;  // a row in float32, twice
    float *c, *up;        // sums of a panel, and of that of `up` where the weight is gated
    uint8_t* scratch;
    INLINE Desk(uint8_t* memory, const Sizes& sizes, const Linear& w) {
        wide = reinterpret_cast<float*>(memory);
        spare = wide + w.K + 32;
        c = reinterpret_cast<float*>(memory + (sizes.wide + 63) / 64 * 64);
        up = w.gated ? c + sizes.rows * kPanel : nullptr;
        scratch = reinterpret_cast<uint8_t*>(c) + sizes.c;
    }
};

// Rows first .. first + rows - 1 of x, to be prepared in `memory`.
INLINE Block block_at(const MatmulArgs& a, int64_t first, int64_t rows, const Sizes& sizes, uint8_t* memory) {
    Block block{&a, first, rows, {}, nullptr, nullptr, {sizes.rows, chunk_inputs(a)}};
    if (a.weight->quantize) {
        block.rounded.codes = reinterpret_cast<int8_t*>(memory);
        block.rounded.chunks = block.chunks;
        block.rounded.scales = reinterpret_cast<float*>(memory + sizes.rows * sizes.row);
        block.rounded.sums = reinterpret_cast<int32_t*>(block.rounded.scales + sizes.rows * a.weight->segments);
    } else if (as_pairs(a)) {
        block.pairs = reinterpret_cast<uint16_t*>(memory);
    } else {
        block.floats = reinterpret_cast<float*>(memory);
    }
    if (a.additions != 0) {
        block.between = Between(a, sizes.rows);
        block.between.at = reinterpret_cast<float*>(memory + sizes.shared(*a.weight));
    }
    return block;
}

// c = a panel's product with all rows of a block. What outputs are multiplied with comes last: until then 4-bit floats with scales in
// e4m3 have 6 bits, and are exact in any type.
INLINE void panel_sums(const Block& block, int64_t panel, int v0, int v1, uint8_t* scratch, float* c) {
    zero(c, block.rows * kPanel);
    if (block.a->weight->quantize) accumulate_integers(block, panel, v0, v1, scratch, c);
    else accumulate_floats(block, panel, v0, v1, scratch, c);
    if (const float* factors = block.a->weight->factors)
        for (int v = 16 * v0; v < 16 * v1; v += 16) {
            const F factor = load(factors + panel * kPanel + v);
            for (int64_t row = 0; row < block.rows; ++row) store(c + row * kPanel + v, load(c + row * kPanel + v) * factor);
        }
}

// A panel (with that of `up` behind it where the weight is gated) from the product to what is written.
INLINE void run_panel(const Block& block, int64_t panel, int v0, int v1, const Desk& desk) {
    if (block.a->additions != 0) ask_for_between(*block.a, block.first, block.rows, panel, desk.up != nullptr);
    panel_sums(block, panel, v0, v1, desk.scratch, desk.c);
    if (desk.up != nullptr) panel_sums(block, panel + 1, v0, v1, desk.scratch, desk.up);
    if (block.a->additions != 0) {
        float* scratch = reinterpret_cast<float*>(desk.scratch);
        add_between(*block.a, block.first, block.rows, block.between, panel, v0, v1, scratch, desk.c);
        if (desk.up != nullptr) add_between(*block.a, block.first, block.rows, block.between, panel + 1, v0, v1, scratch, desk.up);
    }
    if (block.a->weight->limit > 0) finish_panel<Gate::clamp>(block, panel, v0, v1, desk.c, desk.up);
    else if (block.a->weight->gelu) finish_panel<Gate::gelu>(block, panel, v0, v1, desk.c, desk.up);
    else finish_panel<Gate::silu>(block, panel, v0, v1, desk.c, desk.up);
}

// Many threads, few outputs: they share panels.
INLINE int parts_of(const Pool& pool, int64_t panels, int64_t rows) { return panels < 3 * pool.size() && rows <= kRows ? 2 : 1; }

INLINE void run_block(Pool& pool, const Block& block, const Sizes& sizes) {
    const Linear& w = *block.a->weight;
    const int64_t step = w.gated ? 2 : 1, panels = w.panels / step;
    const int parts = parts_of(pool, panels, block.rows);
    pool.reset(panels * parts);
    pool.run([&](int thread) {
        const Desk desk(pool.scratch(thread, size_t(sizes.thread())), sizes, w);
        const int64_t n = pool.size();
        for (int64_t row = block.rows * thread / n; row < block.rows * (thread + 1) / n; ++row) prepare_row(block, row, desk.wide, desk.spare);
        if (block.a->additions != 0)
            make_between(*block.a, block.first, block.rows, block.between, thread, int(n), reinterpret_cast<float*>(desk.scratch));
        pool.barrier();
        start_tiles(w, block.rows);
        for (int64_t item; pool.next(thread, item);) {
            const int v0 = int(item % parts) * 4 / parts;
            run_panel(block, item / parts * step, v0, v0 + 4 / parts, desk);
        }
        stop_tiles(w, block.rows);
    });
}

inline void matmul(Pool& pool, const MatmulArgs& a) {
    const Linear& w = *a.weight;
    const Sizes sizes(a);
    for (int t = 0; t < pool.size(); ++t) pool.scratch(t, size_t(sizes.thread()));  // here, where a failure can be told
    const int64_t between = a.additions != 0 ? Between(a, sizes.rows).bytes() : 0;
    uint8_t* memory = pool.scratch(pool.size(), size_t(sizes.shared(w) + between));
    for (int64_t first = 0; first < a.rows; first += kBlock)
        run_block(pool, block_at(a, first, a.rows - first < kBlock ? a.rows - first : kBlock, sizes, memory), sizes);
}

}  // namespace ISA
}  // namespace appliance
