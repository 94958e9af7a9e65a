// Attention over the paged cache, without a contiguous copy of it: softmax online over chunks of 64 keys (Dao et al. 2022).
//
// An item of work is a tile of queries (tokens by the query heads that share a key head) against a range of keys; few tokens take
// all key heads together, so that the cache is read as it lies. A chunk of keys is transposed, and its values widened, into the
// cache of the core; both products are then those of tiles.h. Long ranges are cut into several items, whose results are merged:
// so few long sequences occupy all threads.
#pragma once
#include "chunks.h"

namespace appliance {
namespace ISA {

constexpr int64_t kTile = 48;        // rows (tokens by heads) of an item, where the heads allow it
constexpr int64_t kLeastKeys = 256;  // an item is not made shorter than this
constexpr float kLog2e = 1.44269504f;

struct Work {  // one tile of one sequence, for every key head
    int64_t sequence, row, tokens;     // row: the tile's first in q
    int64_t position;                  // of its first token
    int64_t first, last;               // keys any of its rows sees: first (a multiple of kKeys) .. last - 1
    int64_t together;                  // key heads in an item
    int64_t splits, item, partial;     // parts of the keys; number of the first item; floats before its partial results
};

struct Attention {
    const AttentionArgs* a;
    Work* works;
    int64_t count, items, group, rows;  // rows: most of an item
    int64_t panels;                     // of 64 features
    float* partials;
    bool pairs;                         // bfloat16 by pairs, else float32
    bool coded, shifts;                 // the cache has codes with scales; and, of four bits, with what they are shifted by
    float scale2;                       // of scores, so that shares are powers of 2
    float bend;                         // of products, to what the cap's tanh takes; 0: no cap

    // Floats of an item's result: for each row its maximum and sum, then the features by panels.
    INLINE int64_t partial_size() const { return rows * (2 + panels * kPanel); }
};

// c [rows][64] += x [rows][inputs] times w [inputs][64].
INLINE void multiply(bool pairs, const float* x, int64_t stride, const float* w, int64_t inputs, int64_t rows, float* c) {
    each_tile(rows, [&](int64_t row, int64_t n) {
        with_shape(n, 4, [&](auto r, auto v) {
#if defined(__AVX512BF16__)
            if (pairs) {
                const uint16_t* two = reinterpret_cast<const uint16_t*>(x);
                return pair_rows<r.value, v.value>(reinterpret_cast<const uint16_t*>(w), inputs, 0, 4, two + row * stride, stride, c + row * kPanel);
            }
#endif
            (void)pairs;
            fma_rows<r.value, v.value>(w, inputs, 0, 4, x + row * stride, stride, c + row * kPanel);
        });
    });
}

// One chunk's scores of one row to shares of the sum so far.
INLINE void softmax_row(const Attention& at, const Tile& t, int64_t local, int64_t row, int64_t rows, int64_t base, int64_t low, int64_t high) {
    const float* scores = t.scores + local * kKeys;  // `local` among one head's rows, `row` among all
    F s[4], top = splat(-INFINITY);
    for (int v = 0; v < 4; ++v) s[v] = load(scores + 16 * v);
    if (at.coded)
        for (int v = 0; v < 4; ++v) s[v] = s[v] * load(t.key_scales + 16 * v);
    if (at.shifts)
        for (int v = 0; v < 4; ++v) s[v] = fma(load(t.key_shifts + 16 * v), splat(t.queried[row]), s[v]);
    if (at.bend > 0)
        for (int v = 0; v < 4; ++v) s[v] = tanh(s[v] * splat(at.bend));
    if (base < low || base + kKeys > high) {
        alignas(64) static const int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int v = 0; v < 4; ++v) {
            const I key = iload(kCount) + isplat(int32_t(base + 16 * v));
            const I seen = less(key, isplat(int32_t(high))) & less(isplat(int32_t(low) - 1), key);
            s[v] = select(seen, s[v], splat(-INFINITY));
        }
    }
    for (int v = 0; v < 4; ++v) top = max(s[v], top);
    const float before = t.most[row], chunk = reduce_max(top) * at.scale2, now = chunk > before ? chunk : before;
    F sum = load(t.sums + row * 16);
    if (now > before) {
        const float shrink = before == -INFINITY ? 0.0f : std::exp2(before - now);
        t.most[row] = now;
        sum = sum * splat(shrink);
        if (at.shifts) store(t.shifted + row * 16, load(t.shifted + row * 16) * splat(shrink));
        for (int64_t panel = 0; panel < at.panels; ++panel)
            for (int v = 0; v < 4; ++v) {
                float* out = t.out + (panel * rows + row) * kPanel + 16 * v;
                store(out, load(out) * splat(shrink));
            }
    }
    const F scale = splat(at.scale2), most = splat(now == -INFINITY ? 0.0f : now);  // nothing seen yet: shares of 2^-infinity
    for (int v = 0; v < 4; ++v) {
        F share = exp2(s[v] * scale - most);
        sum = sum + share;
        if (at.shifts) store(t.shifted + row * 16, fma(share, load(t.value_shifts + 16 * v), load(t.shifted + row * 16)));
        if (at.coded) share = share * load(t.value_scales + 16 * v);
        if (at.pairs) As<Type::bf16>::store(reinterpret_cast<uint16_t*>(t.shares) + local * kKeys + 16 * v, share);
        else store(t.shares + local * kKeys + 16 * v, share);
    }
    store(t.sums + row * 16, sum);
}

// Where row r of an item stands: rows go by key head, then token, then query head.
struct Place {
    int64_t token, head;  // the row of q, and its query head
    INLINE Place(const Attention& at, const Work& work, int64_t head, int64_t r) {
        const int64_t rows = work.tokens * at.group;
        token = work.row + r % rows / at.group;
        this->head = (head + r / rows) * at.group + r % at.group;
    }
};

template <Type T> INLINE void load_queries(const Attention& at, const Work& work, int64_t head, const Tile& t) {
    using Item = typename As<T>::Item;
    const AttentionArgs& a = *at.a;
    const int64_t dim = a.cache.dim;
    for (int64_t r = 0; r < work.together * work.tokens * at.group; ++r) {
        const Place place(at, work, head, r);
        const Item* q = static_cast<const Item*>(a.q) + place.token * a.q_stride + place.head * dim;
        if (at.pairs) std::memcpy(reinterpret_cast<uint16_t*>(t.queries) + r * dim, q, size_t(dim) * 2);
        else
            for (int64_t d = 0; d < dim; d += 16) store_some<Type::f32>(t.queries + r * dim + d, load_some<T>(q + d, dim - d), dim - d);
        if (!at.shifts) continue;
        F sum = splat(0);
        for (int64_t d = 0; d < dim; d += 16) sum = sum + load_some<T>(q + d, dim - d);
        t.queried[r] = reduce_add(sum);
    }
}

template <Type T> INLINE void write_row(const Attention& at, const Work& work, int64_t head, int64_t r, const float* features, int64_t stride, float most, float sum) {
    using Item = typename As<T>::Item;
    const int64_t dim = at.a->cache.dim;
    const Place place(at, work, head, r);
    Item* out = static_cast<Item*>(at.a->out) + (place.token * at.a->q_heads + place.head) * dim;
    float part = 1.0f / sum;
    if (at.a->sinks != nullptr) {  // a share of the sum without a value; once, after all parts of the keys
        float sink[16];
        store(sink, load_some<T>(static_cast<const Item*>(at.a->sinks) + place.head, 1) * splat(kLog2e));
        const float top = sink[0] > most ? sink[0] : most, shrink = std::exp2(most - top);
        part = shrink / (sum * shrink + std::exp2(sink[0] - top));
    }
    const F share = splat(part);
    for (int64_t d = 0; d < dim; d += 16) store_some<T>(out + d, load(features + d / kPanel * stride + d % kPanel) * share, dim - d);
}

INLINE void attend(const Attention& at, const Work& work, int64_t head, int64_t split, float* memory) {
    const AttentionArgs& a = *at.a;
    const int64_t each = work.tokens * at.group, rows = each * work.together, dim = a.cache.dim;
    const Tile t(memory, rows, dim, at.panels);
    with_type(a.type, [&](auto tag) { load_queries<decltype(tag)::value>(at, work, head, t); });
    zero(t.out, at.panels * rows * kPanel);
    zero(t.sums, rows * 16);
    zero(t.shifted, rows * 16);
    for (int64_t r = 0; r < rows; ++r) t.most[r] = -INFINITY;
    const int64_t chunks = (work.last - work.first + kKeys - 1) / kKeys;
    const int64_t begin = work.first + chunks * split / work.splits * kKeys, stop = work.first + chunks * (split + 1) / work.splits * kKeys;
    const int64_t end = stop < work.last ? stop : work.last;
    int64_t here[kKeys], following[kKeys];
    int64_t n = begin < end ? locate(a, work.sequence, begin, work.last, head, here) : 0;
    for (int64_t base = begin; base < end; base += kKeys) {
        const int64_t next = base + kKeys < end ? locate(a, work.sequence, base + kKeys, work.last, head, following) : 0;
        Ahead ahead{a.cache, following, next, work.together};
        for (int64_t h = 0; h < work.together; ++h) {
            load_chunk(a.cache, Rows(a.cache, here, n, h), at.pairs, at.panels, t, ahead);
            if (at.coded) load_scales(a.cache, here, n, h, t);
            ahead.ask(8);
            zero(t.scores, each * kKeys);
            multiply(at.pairs, t.queries + h * each * dim / (at.pairs ? 2 : 1), dim, t.keys, dim, each, t.scores);
            for (int64_t r = 0; r < each; ++r) {
                const int64_t position = work.position + r / at.group, low = a.window > 0 ? position - a.window + 1 : 0;
                softmax_row(at, t, r, h * each + r, rows, base, low, position + 1);
                ahead.ask(2);
            }
            for (int64_t panel = 0; panel < at.panels; ++panel) {
                const float* values = t.values + panel * kKeys * kPanel / (at.pairs ? 2 : 1);
                multiply(at.pairs, t.shares, kKeys, values, kKeys, each, t.out + (panel * rows + h * each) * kPanel);
            }
        }
        ahead.ask(kKeys * work.together);
        n = next;
        std::memcpy(here, following, size_t(next) * sizeof here[0]);
    }
    float* partial = at.partials + work.partial + (head / work.together * work.splits + split) * at.partial_size();
    for (int64_t r = 0; r < rows; ++r) {
        const float sum = reduce_add(load(t.sums + r * 16));
        if (at.shifts) {
            const F shift = splat(reduce_add(load(t.shifted + r * 16)));
            for (int64_t panel = 0; panel < at.panels; ++panel)
                for (int64_t d = 0; d < kPanel; d += 16) {
                    float* out = t.out + (panel * rows + r) * kPanel + d;
                    store(out, load(out) + shift);
                }
        }
        if (work.splits == 1) {
            with_type(a.type, [&](auto tag) { write_row<decltype(tag)::value>(at, work, head, r, t.out + r * kPanel, rows * kPanel, t.most[r], sum); });
            continue;
        }
        float* to = partial + r * (2 + at.panels * kPanel);
        to[0] = t.most[r];
        to[1] = sum;
        for (int64_t panel = 0; panel < at.panels; ++panel) std::memcpy(to + 2 + panel * kPanel, t.out + (panel * rows + r) * kPanel, kPanel * 4);
    }
}

// The parts of a row's keys, weighted by their shares of the whole sum.
INLINE void merge(const Attention& at, const Work& work, int64_t head, float* features) {
    const int64_t width = at.panels * kPanel;
    const float* partials = at.partials + work.partial + head / work.together * work.splits * at.partial_size();
    for (int64_t r = 0; r < work.together * work.tokens * at.group; ++r) {
        const auto part = [&](int64_t s) { return partials + s * at.partial_size() + r * (2 + width); };
        float most = -INFINITY, sum = 0;
        for (int64_t s = 0; s < work.splits; ++s) most = part(s)[0] > most ? part(s)[0] : most;
        zero(features, width);
        for (int64_t s = 0; s < work.splits; ++s) {
            if (part(s)[0] == -INFINITY) continue;
            const float share = std::exp2(part(s)[0] - most);
            sum += share * part(s)[1];
            for (int64_t d = 0; d < width; d += 16) store(features + d, fma(load(part(s) + 2 + d), splat(share), load(features + d)));
        }
        with_type(at.a->type, [&](auto tag) { write_row<decltype(tag)::value>(at, work, head, r, features, kPanel, most, sum); });
    }
}

// Tiles of all sequences, and how often the keys of each are cut. Returns the floats of partial results.
INLINE int64_t plan(Attention& at, int threads, int64_t tokens_at_once) {
    const AttentionArgs& a = *at.a;
    int64_t all = 0, partials = 0;
    at.count = at.items = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
        const int64_t begin = a.starts[s], queries = a.starts[s + 1] - begin;
        for (int64_t i = 0; i < queries; i += tokens_at_once) {
            const int64_t tokens = queries - i < tokens_at_once ? queries - i : tokens_at_once, position = a.lengths[s] - queries + i;
            const int64_t low = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
            const int64_t together = a.cache.heads * tokens * at.group <= kTile ? a.cache.heads : 1;
            at.works[at.count++] = {s, begin + i, tokens, position, low / kKeys * kKeys, position + tokens, together, 1, 0, 0};
            all += (position + tokens - low) * a.cache.heads;
        }
    }
    const int64_t share = threads == 1 ? all + kKeys * a.cache.heads : all / (int64_t(threads) * 4);  // keys by heads of an item
    for (int64_t i = 0; i < at.count; ++i) {
        Work& work = at.works[i];
        const int64_t keys = work.last - work.first, most = keys / kLeastKeys;
        work.splits = share > 0 ? keys * work.together / share : 1;
        if (work.splits > most) work.splits = most;
        if (work.splits < 1) work.splits = 1;
        work.item = at.items;
        work.partial = partials;
        const int64_t blocks = a.cache.heads / work.together;
        at.items += blocks * work.splits;
        if (work.splits > 1) partials += blocks * work.splits * at.partial_size();
    }
    return partials;
}

inline void attention(Pool& pool, const AttentionArgs& a) {
    Attention at{};
    at.a = &a;
    at.scale2 = (a.cap > 0 ? a.cap : a.scale) * kLog2e;
    at.bend = a.cap > 0 ? a.scale / a.cap : 0.0f;
    at.group = a.q_heads / a.cache.heads;
    at.panels = (a.cache.dim + kPanel - 1) / kPanel;
#if defined(__AVX512BF16__)
    at.pairs = a.type == Type::bf16 && (a.cache.type == Type::bf16 || a.cache.coded()) && a.cache.dim % 2 == 0;
#endif
    at.coded = a.cache.coded();
    at.shifts = a.cache.type == Type::i4;
    const int64_t tokens_at_once = at.group >= kTile ? 1 : kTile / at.group;
    int64_t most = 0;
    for (int64_t s = 0; s < a.sequences; ++s) most += (a.starts[s + 1] - a.starts[s] + tokens_at_once - 1) / tokens_at_once;
    at.rows = tokens_at_once * at.group > kTile ? tokens_at_once * at.group : kTile;
    // Twice: how much memory the partial results take is known once the works are.
    const size_t list = size_t(most) * sizeof(Work) / 64 * 64 + 64;
    at.works = reinterpret_cast<Work*>(pool.scratch(pool.size(), list));
    const size_t partials = size_t(plan(at, pool.size(), tokens_at_once)) * 4;
    uint8_t* shared = pool.scratch(pool.size(), list + partials);
    if (reinterpret_cast<Work*>(shared) != at.works) {
        at.works = reinterpret_cast<Work*>(shared);
        plan(at, pool.size(), tokens_at_once);
    }
    at.partials = reinterpret_cast<float*>(shared + list);
    const size_t bytes = size_t(Tile::floats(at.rows, a.cache.dim, at.panels)) * 4;
    for (int t = 0; t < pool.size(); ++t) pool.scratch(t, bytes);
    pool.reset(at.items);
    pool.run([&](int thread) {
        float* memory = reinterpret_cast<float*>(pool.scratch(thread, bytes));
        int64_t i = 0;
        for (int64_t item; pool.next(thread, item);) {
            if (item < at.works[i].item) i = 0;  // another thread's share
            while (i + 1 < at.count && at.works[i + 1].item <= item) ++i;
            const Work& work = at.works[i];
            attend(at, work, (item - work.item) / work.splits * work.together, (item - work.item) % work.splits, memory);
        }
        if (partials == 0) return;
        pool.barrier();
        for (int64_t w = 0; w < at.count; ++w)
            for (int64_t head = 0; head < a.cache.heads; head += at.works[w].together)
                if (at.works[w].splits > 1 && (w * a.cache.heads + head / at.works[w].together) % pool.size() == thread) merge(at, at.works[w], head, memory);
    });
}

}  // namespace ISA
}  // namespace appliance
