// A mixture of experts: a router gives each token a few of many gated products, whose weighted sum is added to it.
//
//   tokens by expert   | e0: t3 t7 | e2: t0 | e5: t1 t3 t4 | ..    experts that nobody has chosen are not read
//   gate and up        all threads prepare these rows, each as its expert wants it; an item of work is a panel of one expert
//   down               the same of what came out of that; an item is a panel of the sum, for which a thread takes the experts in turn
//
// So threads meet as often as in two products, however many experts there are, and the order of additions is the experts'. An MLP
// that all tokens go through is two products more, added at last.
#pragma once
#include "matmul.h"
#include "small.h"

namespace appliance {
namespace ISA {

// An expert's rows: first .. first + rows - 1 of all, prepared at `prepared` in the shared memory.
struct Group {
    int64_t expert, first, rows, prepared;
};

// Who goes where, in memory that the products do not use.
struct Routes {
    int64_t tokens, pairs, count = 0;  // count: groups
    float* logits;     // [tokens][experts]
    float* shares;     // [tokens][active]
    int32_t* chosen;   // [tokens][active]
    int32_t* places;   // [experts]: where the next row of one goes
    int32_t* rows;     // [pairs], by expert: the token
    float* weights;    // [pairs]: its share
    Group* groups;     // [experts]
    float* gates;      // [tokens]: of the MLP that all go through
    uint8_t* inner;    // [pairs][features of an expert]
    uint8_t* shared;   // [tokens][features of that MLP]

    static INLINE int64_t bytes(const Mixture& m, int64_t tokens, Type type) {
        const int64_t row = m.down[0]->K * item_size(type), own = m.shared_down == nullptr ? 0 : 4 + m.shared_down->K * item_size(type);
        return tokens * (m.active * (16 + row) + own) + tokens * m.experts * 4 + m.experts * int64_t(sizeof(Group) + 4) + 128;
    }
    INLINE Routes(const Mixture& m, int64_t n, Type type, uint8_t* memory) : tokens(n), pairs(n * m.active) {
        groups = reinterpret_cast<Group*>(memory);
        logits = reinterpret_cast<float*>(groups + m.experts);
        shares = logits + tokens * m.experts;
        weights = shares + pairs;
        chosen = reinterpret_cast<int32_t*>(weights + pairs);
        rows = chosen + pairs;
        places = rows + pairs;
        gates = reinterpret_cast<float*>(places + m.experts);
        const auto behind = [&](const void* end) { return memory + (static_cast<const uint8_t*>(end) - memory + 63) / 64 * 64; };
        inner = behind(gates + (m.shared_down == nullptr ? 0 : tokens));
        shared = behind(inner + pairs * m.down[0]->K * item_size(type));
    }
};

// The `count` largest of key(0) .. key(n - 1), of equal ones the first.
template <class G> INLINE void largest(int64_t n, int64_t count, G&& key, int32_t* chosen) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t at = i < count ? i : count - 1;
        if (i >= count && !(key(i) > key(chosen[at]))) continue;
        for (; at > 0 && key(i) > key(chosen[at - 1]); --at) chosen[at] = chosen[at - 1];
        chosen[at] = int32_t(i);
    }
}

// Of a softmax over logits: it is not needed for the choice, nor for the shares where these are made to add up to 1.
INLINE void choose_of_softmax(const Mixture& m, const float* logits, int32_t* chosen, float* shares) {
    largest(m.experts, m.active, [&](int64_t i) { return logits[i]; }, chosen);
    const float most = logits[chosen[0]];
    float sum = 0;
    if (!m.normalized)
        for (int64_t i = 0; i < m.experts; ++i) sum += __builtin_expf(logits[i] - most);
    for (int64_t j = 0; j < m.active; ++j) {
        shares[j] = __builtin_expf(logits[chosen[j]] - most);
        if (m.normalized) sum += shares[j];
    }
    for (int64_t j = 0; j < m.active; ++j) shares[j] = shares[j] / sum * m.scale;
}

// A bit for each group of experts that a token may go to: those whose largest keys (m.best: one, or two) have the largest sums.
template <class G> INLINE uint64_t choose_groups(const Mixture& m, G&& key) {
    if (m.groups == 1) return 1;
    const int64_t size = m.experts / m.groups;
    float sums[kMostGroups];
    int32_t best[2], chosen[kMostGroups];
    for (int64_t g = 0; g < m.groups; ++g) {
        const auto inside = [&](int64_t i) { return key(g * size + i); };
        largest(size, m.best, inside, best);
        sums[g] = inside(best[0]) + (m.best > 1 ? inside(best[1]) : 0.0f);
    }
    largest(m.groups, m.chosen_groups, [&](int64_t g) { return sums[g]; }, chosen);
    uint64_t found = 0;
    for (int64_t j = 0; j < m.chosen_groups; ++j) found |= uint64_t(1) << chosen[j];
    return found;
}

// The experts of a token by its logits (which are overwritten), and their shares.
INLINE void choose(const Mixture& m, float* logits, int32_t* chosen, float* shares) {
    if (!m.sigmoid && m.correction == nullptr && m.groups == 1) return choose_of_softmax(m, logits, chosen, shares);
    float most = logits[0], total = 0;
    for (int64_t i = 1; i < m.experts; ++i) most = logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < m.experts; ++i) {
        logits[i] = m.sigmoid ? 1.0f / (1.0f + __builtin_expf(-logits[i])) : __builtin_expf(logits[i] - most);
        total += logits[i];
    }
    if (!m.sigmoid)
        for (int64_t i = 0; i < m.experts; ++i) logits[i] /= total;
    const auto key = [&](int64_t i) { return m.correction == nullptr ? logits[i] : logits[i] + m.correction[i]; };
    const uint64_t groups = choose_groups(m, key);
    const int64_t size = m.experts / m.groups;
    largest(m.experts, m.active, [&](int64_t i) { return groups >> (i / size) & 1 ? key(i) : -__builtin_inff(); }, chosen);
    float sum = 0;
    for (int64_t j = 0; j < m.active; ++j) sum += shares[j] = logits[chosen[j]];
    const float by = m.normalized ? sum > m.least ? sum : m.least : 1.0f;
    for (int64_t j = 0; j < m.active; ++j) shares[j] = shares[j] / by * m.scale;
}

// Groups of the experts that were chosen, in their order; within a group tokens are in theirs.
INLINE void group(const Mixture& m, Routes& r) {
    for (int64_t e = 0; e < m.experts; ++e) r.places[e] = 0;
    for (int64_t i = 0; i < r.pairs; ++i) ++r.places[r.chosen[i]];
    int64_t first = 0;
    for (int64_t e = 0; e < m.experts; ++e) {
        const int64_t rows = r.places[e];
        r.places[e] = int32_t(first);
        if (rows > 0) r.groups[r.count++] = {e, first, rows, 0};
        first += rows;
    }
    for (int64_t i = 0; i < r.pairs; ++i) {
        const int64_t at = r.places[r.chosen[i]]++;
        r.rows[at] = int32_t(i / m.active);
        r.weights[at] = r.shares[i];
    }
}

// One product for each group, of the rows that are prepared for it in the shared memory.
struct Products {
    const Linear* const* weights;  // by expert
    MatmulArgs common;             // of all; x and out of the first row
    const int32_t* gather;
    Routes& routes;
    int64_t most = 0;              // rows of the largest group
    uint8_t* memory = nullptr;

    INLINE MatmulArgs args(const Group& g) const {
        MatmulArgs a = common;
        a.weight = weights[g.expert];
        a.rows = g.rows;
        if (gather != nullptr) a.gather = gather + g.first;
        else a.x = static_cast<const char*>(a.x) + g.first * a.stride * item_size(a.type);
        if (a.out != nullptr) a.out = static_cast<char*>(a.out) + g.first * a.weight->outputs() * item_size(a.out_type);
        return a;
    }
    INLINE const Linear& any() const { return *weights[routes.groups[0].expert]; }
    // A thread's part of the work on the largest group.
    INLINE Sizes sizes() const {
        MatmulArgs a = args(routes.groups[0]);
        a.rows = most;
        return Sizes(a);
    }
    // Memory for all rows; threads have `more` bytes beside what a product needs.
    INLINE void make_room(Pool& pool, int64_t more) {
        int64_t bytes = 0;
        for (int64_t i = 0; i < routes.count; ++i) {
            Group& g = routes.groups[i];
            g.prepared = bytes;
            bytes += (Sizes(args(g)).shared(*weights[g.expert]) + 63) / 64 * 64;
            if (g.rows > most) most = g.rows;
        }
        memory = pool.scratch(pool.size(), size_t(bytes));
        for (int t = 0; t < pool.size(); ++t) pool.scratch(t, size_t(sizes().thread() + more));
    }
    // Inside run: a thread's share of all rows.
    INLINE void prepare(int thread, int threads, const Desk& desk) const {
        const int64_t from = routes.pairs * thread / threads, to = routes.pairs * (thread + 1) / threads;
        for (int64_t i = 0; i < routes.count; ++i) {
            const Group& g = routes.groups[i];
            if (g.first >= to || g.first + g.rows <= from) continue;
            const MatmulArgs a = args(g);
            const Block block = block_at(a, 0, g.rows, Sizes(a), memory + g.prepared);
            for (int64_t row = from > g.first ? from - g.first : 0; row < g.rows && g.first + row < to; ++row) prepare_row(block, row, desk.wide, desk.spare);
        }
    }
    // f(block), with tiles as the group wants them.
    template <class G> INLINE void with_block(const Group& g, G&& f) const {
        const MatmulArgs a = args(g);
        start_tiles(*a.weight, g.rows);
        f(block_at(a, 0, g.rows, Sizes(a), memory + g.prepared));
        stop_tiles(*a.weight, g.rows);
    }
};

INLINE void run_gated(Pool& pool, Products& p) {
    p.make_room(pool, 0);
    const Sizes sizes = p.sizes();
    const int64_t panels = p.any().panels / 2;
    const int parts = parts_of(pool, panels * p.routes.count, p.most);
    pool.reset(p.routes.count * panels * parts);
    pool.run([&](int thread) {
        const Desk desk(pool.scratch(thread, size_t(sizes.thread())), sizes, p.any());
        p.prepare(thread, pool.size(), desk);
        pool.barrier();
        for (int64_t item; pool.next(thread, item);) {
            const int v0 = int(item % parts) * 4 / parts;
            p.with_block(p.routes.groups[item / parts / panels], [&](const Block& block) {
                run_panel(block, item / parts % panels * 2, v0, v0 + 4 / parts, desk);
            });
        }
    });
}

// `whole`: the sum's args, with as many rows as there are tokens.
INLINE void run_down(Pool& pool, Products& p, const MatmulArgs& whole) {
    const int64_t bytes = whole.rows * kPanel * 4;
    p.make_room(pool, bytes);
    const Sizes sizes = p.sizes();
    const int parts = parts_of(pool, p.any().panels, p.most);
    const Block sum{&whole, 0, whole.rows, {}, nullptr, nullptr, {}};
    pool.reset(p.any().panels * parts);
    pool.run([&](int thread) {
        uint8_t* memory = pool.scratch(thread, size_t(sizes.thread() + bytes));
        float* total = reinterpret_cast<float*>(memory);
        const Desk desk(memory + bytes, sizes, p.any());
        p.prepare(thread, pool.size(), desk);
        pool.barrier();
        for (int64_t item; pool.next(thread, item);) {
            const int64_t panel = item / parts;
            const int v0 = int(item % parts) * 4 / parts, v1 = v0 + 4 / parts;
            zero(total, whole.rows * kPanel);
            for (int64_t i = 0; i < p.routes.count; ++i) {
                const Group& g = p.routes.groups[i];
                const float* bias = p.weights[g.expert]->bias;
                p.with_block(g, [&](const Block& block) { panel_sums(block, panel, v0, v1, desk.scratch, desk.c); });
                for (int64_t row = 0; row < g.rows; ++row) {
                    const F weight = splat(p.routes.weights[g.first + row]);
                    float* to = total + p.routes.rows[g.first + row] * kPanel;
                    for (int v = 16 * v0; v < 16 * v1; v += 16) {
                        F y = load(desk.c + row * kPanel + v);
                        if (bias != nullptr) y = y + load(bias + panel * kPanel + v);
                        store(to + v, fma(weight, y, load(to + v)));
                    }
                }
            }
            finish_panel<Gate::silu>(sum, panel, v0, v1, total, nullptr);
        }
    });
}

// The gated product of the MLP that all tokens go through, times its share: what is behind it is linear.
INLINE void run_shared(Pool& pool, const MixtureArgs& a, const void* x, const Routes& r) {
    const Mixture& m = *a.mixture;
    const int64_t columns = m.shared_down->K;
    const auto multiply = [&](const Linear* w, void* out, Type type) {
        matmul(pool, {w, x, r.tokens, w->K, a.type, a.norm, a.eps, a.offset, nullptr, out, type});
    };
    multiply(m.shared_gate_up, r.shared, a.type);
    if (m.shared_gate == nullptr) return;
    multiply(m.shared_gate, r.gates, Type::f32);
    with_type(a.type, [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        ranges(pool, r.tokens, columns * 4, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                typename As<T>::Item* row = reinterpret_cast<typename As<T>::Item*>(r.shared) + t * columns;
                const F share = splat(1.0f / (1.0f + __builtin_expf(-r.gates[t])));
                for (int64_t k = 0; k < columns; k += 16) store_some<T>(row + k, load_some<T>(row + k, columns - k) * share, columns - k);
            }
        });
    });
}

INLINE void mix(Pool& pool, const MixtureArgs& a, const void* x, int64_t tokens, void* out) {
    const Mixture& m = *a.mixture;
    const int64_t hidden = m.router->K, inner = m.down[0]->K;
    Routes r(m, tokens, a.type, pool.scratch(pool.size() + 1, size_t(Routes::bytes(m, tokens, a.type))));
    const void* norm = m.router_norm != nullptr ? m.router_norm : a.norm;
    matmul(pool, {m.router, x, tokens, hidden, a.type, norm, a.eps, a.offset, nullptr, r.logits, Type::f32});
    ranges(pool, tokens, m.experts * 64, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            const int32_t* chosen = r.chosen + t * m.active;
            float* shares = r.shares + t * m.active;
            choose(m, r.logits + t * m.experts, r.chosen + t * m.active, shares);
            for (int64_t j = 0; m.gains != nullptr && j < m.active; ++j) shares[j] *= m.gains[chosen[j]];
        }
    });
    group(m, r);
    if (m.shared_down != nullptr) run_shared(pool, a, x, r);  // before x is overwritten
    Products up{m.gate_up, {nullptr, x, 0, hidden, a.type, a.norm, a.eps, a.offset, nullptr, r.inner, a.type}, r.rows, r};
    run_gated(pool, up);
    Products down{m.down, {nullptr, r.inner, 0, inner, a.type, nullptr, 0, 0, nullptr, nullptr, a.type}, nullptr, r};
    Linear sum = *m.down[0];
    sum.bias = nullptr;  // each expert's is in its part
    run_down(pool, down, {&sum, nullptr, tokens, inner, a.type, nullptr, 0, 0, a.alone ? nullptr : x, out, a.type});
    if (m.shared_down != nullptr) matmul(pool, {m.shared_down, r.shared, tokens, m.shared_down->K, a.type, nullptr, 0, 0, out, out, a.type});
}

inline void mixture(Pool& pool, const MixtureArgs& a) {
    const int64_t row = a.mixture->router->K * item_size(a.type);
    for (int64_t first = 0; first < a.rows; first += kBlock) {
        const int64_t tokens = a.rows - first < kBlock ? a.rows - first : kBlock;
        mix(pool, a, static_cast<const char*>(a.x) + first * row, tokens, static_cast<char*>(a.out) + first * row);
    }
}

}  // namespace ISA
}  // namespace appliance
