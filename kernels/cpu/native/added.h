// What low-rank adapters add to the sums of a product, for those of its rows that have one: (x A') B'.
//
// First all threads make what is between the two matrices, in pieces of the inputs; then whoever has a panel's sums adds what comes of
// it before bias, gate and residual. Sums do not depend on how many rows or threads there are: pieces are added in order.
#pragma once
#include "tiles.h"

namespace appliance {
namespace ISA {

constexpr int64_t kPiece = 1024;  // inputs
constexpr int kTogether = 4;      // rows that read a line of A once: a thread's scratch has room for a piece of each
constexpr int64_t kLinesAhead = 8192;  // bytes of A before they are multiplied that they are asked for: few of its lines are read
constexpr int64_t kFew = 2;       // rows of an adapter for which B is not written down as floats
constexpr int64_t kRanks = 128;   // of B as floats at a time, likewise

// What is between: float32 [pieces][rows of the block][width].
struct Between {
    float* at = nullptr;
    int64_t rows = 0, width = 0, pieces = 0;
    INLINE Between() = default;
    INLINE Between(const MatmulArgs& a, int64_t block_rows) : rows(block_rows), pieces((a.weight->K + kPiece - 1) / kPiece) {
        for (int64_t j = 0; j < a.additions; ++j) {
            const int64_t ranks = (a.added[j].a->N + 15) / 16 * 16;
            width = ranks > width ? ranks : width;
        }
    }
    INLINE int64_t bytes() const { return pieces * rows * width * 4 + 64; }  // the last ranks may be read 16 at a time from any
    INLINE float* of(int64_t piece, int64_t row) const { return at + (piece * rows + row) * width; }
};

// The panel of B, which has gate, then up, for one of the weight.
INLINE int64_t panel_of_b(const Linear& w, int64_t panel) { return !w.gated ? panel : panel / 2 + (panel % 2 ? w.N / 2 / kPanel : 0); }

INLINE int64_t row_of(const Added& one, int64_t i) { return one.rows != nullptr ? one.rows[i] : one.first + i; }

// f(addition) for those of the rows first .. first + rows - 1.
template <class G> INLINE void each_addition(const MatmulArgs& a, int64_t first, int64_t rows, G&& g) {
    for (int64_t j = 0; j < a.additions; ++j) {
        const int64_t row = row_of(a.added[j], 0) - first;
        if (row >= 0 && row < rows) g(a.added[j]);
    }
}

// A piece of a row of x in float32, normalized, and zeros up to a multiple of 16.
INLINE void widen_piece(const MatmulArgs& a, int64_t row, int64_t first, int64_t count, float* out) {
    const int64_t K = a.weight->K;
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        using Item = typename As<T>::Item;
        const Item *x = static_cast<const Item*>(a.x) + row * a.stride, *norm = static_cast<const Item*>(a.norm);
        F factor = splat(1);
        if (norm != nullptr) {
            F squares = splat(0);
            for (int64_t k = 0; k < K; k += 16) {
                const F v = load_some<T>(x + k, K - k);
                squares = fma(v, v, squares);
            }
            factor = splat(1.0f / std::sqrt(reduce_add(squares) / float(K) + a.eps));
        }
        for (int64_t k = 0; k < count; k += 16) {
            const F v = load_some<T>(x + first + k, count - k);
            store(out + k, norm == nullptr ? v : v * factor * (load_some<T>(norm + first + k, count - k) + splat(a.offset)));
        }
    });
}

// The inputs k and k + 1 (k even) of 16 outputs of a dense weight.
template <Codes C> INLINE void two_inputs(const Linear& w, int64_t vector, int64_t k, F& even, F& odd) {
    const int64_t panel = vector / 4, item = (panel * w.K + k) * kPanel + 16 * (vector % 4);
    if constexpr (C == Codes::bf16) {
        const I line = iload(w.data + (panel * ((w.K + 1) / 2) + k / 2) * 256 + 64 * (vector % 4));
        even = as_float(line << 16);
        odd = as_float(line & isplat(int32_t(0xffff0000)));
    } else {
        constexpr Type T = C == Codes::f16 ? Type::f16 : Type::f32;
        const auto* data = reinterpret_cast<const typename As<T>::Item*>(w.data) + item;
        even = As<T>::load(data);
        odd = k + 1 < w.K ? As<T>::load(data + kPanel) : splat(0);
    }
}

// 16 ranks of R rows over one piece of the inputs. x: a piece of each, kPiece apart.
template <int R, Codes C> INLINE void shrink(const Linear& w, int64_t vector, int64_t first, int64_t count, const float* x, float* const* to) {
    F sums[R][2];
    UNROLL for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = splat(0);
    const int64_t line = kPanel * (C == Codes::f32 ? 4 : 2);  // of an input
    const uint8_t* ahead = w.data + (vector / 4 * (C == Codes::bf16 ? (w.K + 1) / 2 * 2 : w.K) + first) * line + 64 * (vector % 4) + kLinesAhead;
    for (int64_t k = 0; k < count; k += 2) {
        F even, odd;
        two_inputs<C>(w, vector, first + k, even, odd);
        __builtin_prefetch(ahead + k * line, 0, 3);
        UNROLL for (int r = 0; r < R; ++r) {
            sums[r][0] = fma(splat(x[r * kPiece + k]), even, sums[r][0]);
            sums[r][1] = fma(splat(x[r * kPiece + k + 1]), odd, sums[r][1]);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) store(to[r] + 16 * vector, sums[r][0] + sums[r][1]);
}

template <int R> INLINE void shrink_rows(const Linear& w, int64_t vector, int64_t first, int64_t count, const float* x, float* const* to) {
    if (w.codes == Codes::bf16) shrink<R, Codes::bf16>(w, vector, first, count, x, to);
    else if (w.codes == Codes::f16) shrink<R, Codes::f16>(w, vector, first, count, x, to);
    else shrink<R, Codes::f32>(w, vector, first, count, x, to);
}

// A thread's share of what is between, for the rows first .. first + rows - 1 of x. `scratch`: kTogether pieces.
INLINE void make_between(const MatmulArgs& a, int64_t first, int64_t rows, const Between& between, int thread, int threads, float* scratch) {
    int64_t item = 0;
    each_addition(a, first, rows, [&](const Added& one) {
        const int64_t vectors = (one.a->N + 15) / 16, K = a.weight->K;
        for (int64_t i = 0; i < one.count; i += kTogether)
            for (int64_t piece = 0; piece < between.pieces; ++piece) {
                // Few rows are shared by their ranks, too; of many that would only be widened more often.
                const bool apart = one.count <= kTogether;
                const int64_t n = one.count - i < kTogether ? one.count - i : kTogether, count = K - piece * kPiece < kPiece ? K - piece * kPiece : kPiece;
                bool wide = false;
                if (!apart && item++ % threads != thread) continue;
                for (int64_t vector = 0; vector < vectors; ++vector) {
                    if (apart && item++ % threads != thread) continue;
                    float* to[kTogether];
                    for (int64_t r = 0; r < n; ++r) {
                        const int64_t row = row_of(one, i + r);
                        to[r] = between.of(piece, row - first);
                        if (!wide) widen_piece(a, row, piece * kPiece, count, scratch + r * kPiece);
                    }
                    wide = true;
                    if (n == 4) shrink_rows<4>(*one.a, vector, piece * kPiece, count, scratch, to);
                    else if (n == 3) shrink_rows<3>(*one.a, vector, piece * kPiece, count, scratch, to);
                    else if (n == 2) shrink_rows<2>(*one.a, vector, piece * kPiece, count, scratch, to);
                    else shrink_rows<1>(*one.a, vector, piece * kPiece, count, scratch, to);
                }
            }
    });
}

// The ranks' values of a row.
INLINE void sum_pieces(const Between& between, int64_t row, int64_t rank, int64_t count, float* x) {
    for (int64_t k = 0; k < count; k += 16) {
        F sum = load(between.of(0, row) + rank + k);
        for (int64_t piece = 1; piece < between.pieces; ++piece) sum = sum + load(between.of(piece, row) + rank + k);
        store(x + k, sum);
    }
}

// c += x [count] times B's, of one row: in the order of fma_tile, without writing floats down.
template <int V, Codes C> INLINE void grow(const Linear& w, int64_t vector, int64_t rank, int64_t count, const float* x, float* c) {
    F sums[V];
    UNROLL for (int v = 0; v < V; ++v) sums[v] = load(c + 16 * v);
    for (int64_t k = 0; k < count; k += 2) {
        const F first = splat(x[k]), second = splat(x[k + 1]);  // that of a rank behind the last meets zeros
        UNROLL for (int v = 0; v < V; ++v) {
            F even, odd;
            two_inputs<C>(w, vector + v, rank + k, even, odd);
            sums[v] = fma(second, odd, fma(first, even, sums[v]));
        }
    }
    UNROLL for (int v = 0; v < V; ++v) store(c + 16 * v, sums[v]);
}

INLINE void grow_row(const Linear& w, int64_t panel, int v0, int v1, int64_t rank, int64_t count, const float* x, float* c) {
    const auto with = [&](auto codes) __attribute__((always_inline)) {
        if (v1 - v0 == 4) grow<4, codes.value>(w, panel * 4, rank, count, x, c);
        else for (int v = v0; v < v1; v += 2) grow<2, codes.value>(w, panel * 4 + v, rank, count, x, c + 16 * v);
    };
    if (w.codes == Codes::bf16) with(CodesTag<Codes::bf16>{});
    else if (w.codes == Codes::f16) with(CodesTag<Codes::f16>{});
    else with(CodesTag<Codes::f32>{});
}

// B's panels come from memory while those of the weight are multiplied.
INLINE void ask_for_between(const MatmulArgs& a, int64_t first, int64_t rows, int64_t panel, bool pair) {
    each_addition(a, first, rows, [&](const Added& one) {
        const int64_t line = kPanel * (one.b->codes == Codes::f32 ? 4 : 2);  // of a rank
        const int64_t bytes = line * (one.b->codes == Codes::bf16 ? (one.b->K + 1) / 2 * 2 : one.b->K);
        for (int64_t p = panel; p <= panel + pair; ++p) {
            const int64_t own = panel_of_b(*a.weight, p);
            for (int64_t i = one.spans[2 * own] * line; i < one.spans[2 * own + 1] * line; i += 64) __builtin_prefetch(one.b->data + own * bytes + i, 0, 2);
        }
    });
}

// c, a panel's sums of the rows first .. first + rows - 1, with what is added to them. `scratch`: kRanks lines of B.
INLINE void add_between(const MatmulArgs& a, int64_t first, int64_t rows, const Between& between, int64_t panel, int v0, int v1, float* scratch, float* c) {
    const int64_t own = panel_of_b(*a.weight, panel);
    each_addition(a, first, rows, [&](const Added& one) {
        const int64_t last = one.spans[2 * own + 1];
        for (int64_t rank = one.spans[2 * own]; rank < last; rank += kRanks) {
            const int64_t count = last - rank < kRanks ? last - rank : kRanks;
            float x[kRows * kRanks];
            if (one.count <= kFew) {
                for (int64_t i = 0; i < one.count; ++i) {
                    const int64_t row = row_of(one, i) - first;
                    sum_pieces(between, row, rank, count, x);
                    grow_row(*one.b, own, v0, v1, rank, count, x, c + row * kPanel);
                }
                continue;
            }
            expand_floats(*one.b, own, rank, count, scratch);
            for (int64_t i = 0, n; i < one.count; i += n) {
                const int64_t row = row_of(one, i);
                for (n = 1; n < kRows && i + n < one.count && row_of(one, i + n) == row + n;) ++n;
                for (int64_t r = 0; r < n; ++r) sum_pieces(between, row - first + r, rank, count, x + r * kRanks);
                with_shape(n, v1 - v0, [&](auto r, auto v) { fma_rows<r.value, v.value>(scratch, count, v0, v1, x, kRanks, c + (row - first) * kPanel); });
            }
        }
    });
}

}  // namespace ISA
}  // namespace appliance
