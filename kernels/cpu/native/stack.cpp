#include "stack.h"

#include <algorithm>

namespace appliance {

// Where modules are joined each has ranks of its own, and zeros in those of the others.
void Adapter::add(int64_t layer, int64_t slot, const Linear& a, const Linear& b) {
    AdapterLayer& own = layers.at(size_t(layer));
    own.a[slot] = &a;
    own.b[slot] = &b;
    own.spans[slot].clear();
    const int64_t step = b.codes == Codes::bf16 ? 2 : 1, lines = (b.K + step - 1) / step, bytes = kPanel * step * (b.codes == Codes::f32 ? 4 : 2);
    const uint8_t* data = b.data;
    const auto counts = [&](int64_t line) { return std::any_of(data + line * bytes, data + (line + 1) * bytes, [](uint8_t one) { return one != 0; }); };
    for (int64_t panel = 0; panel < b.panels; ++panel, data += lines * bytes) {
        int64_t first = 0, last = lines;
        while (last > 0 && !counts(last - 1)) --last;
        while (first < last && !counts(first)) ++first;
        own.spans[slot].push_back(int32_t(first * step / 2 * 2));
        own.spans[slot].push_back(int32_t(std::min(last * step, b.K)));
    }
}

int64_t Stack::width() const {
    int64_t most = 0;
    for (const Layer& one : layers) {
        const int64_t attended = one.attention_norm == nullptr ? 0 : one.o->outputs(), mixed = one.mlp_norm == nullptr ? 0 : one.down->outputs();
        const int64_t read = one.qkv->outputs() + (one.delta.rule == nullptr ? 0 : one.delta.gates->outputs());
        const int64_t beside = one.beside.mixture == nullptr ? 0 : one.o->outputs(), told = one.told.gate == nullptr ? 0 : one.told.gate->outputs() + one.o->outputs();
        most = std::max({most, one.o->K + std::max(read, attended), one.mixture != nullptr ? 0 : one.gate_up->outputs() + mixed + beside, told});
    }
    return most;
}

void run_layers(Pool& pool, const Kernels& kernels, const Stack& stack, const Batch& batch, void* hidden, void* workspace) {
    const Type type = stack.type;
    std::vector<Added> added;
    size_t number = 0;
    const auto multiply = [&](const Linear& w, const void* x, const void* norm, const void* residual, void* out, Slot slot = kSlots) {
        added.clear();
        if (slot != kSlots)
            for (const Adapted& one : batch.adapted)
                if (const AdapterLayer& own = one.adapter->layers[number]; own.a[slot] != nullptr) added.push_back({own.a[slot], own.b[slot], one.rows, one.first, one.count, own.spans[slot].data()});
        kernels.matmul(pool, {&w, x, batch.tokens, w.K, type, norm, stack.eps, stack.offset, residual, out, type, nullptr, added.data(), int64_t(added.size())});
    };
    // residual + norm(x) -> out, [tokens, columns]
    const auto normalize = [&](const void* x, int64_t columns, const void* norm, const void* residual, void* out) {
        kernels.rms_norm(pool, {x, batch.tokens, columns, columns, type, norm, stack.eps, stack.offset, residual, out});
    };
    // sum += w(x), which a norm goes through first where there is one: by way of `spare`.
    const auto add = [&](const Linear& w, const void* x, const void* norm, void* spare, void* sum, Slot slot = kSlots) {
        if (norm == nullptr) return multiply(w, x, nullptr, sum, sum, slot);
        multiply(w, x, nullptr, nullptr, spare, slot);
        normalize(spare, w.outputs(), norm, sum, sum);
    };
    const auto after = [&](void* start, int64_t columns) { return static_cast<char*>(start) + batch.tokens * columns * item_size(type); };
    const char* told = static_cast<const char*>(batch.told);
    for (const Layer& one : stack.layers) {
        // Attention's result, then q, k and v, and gates; later the gated product, when those are no longer needed. Behind what is read of
        // these is room for what is normalized before it is added.
        const int64_t size = one.qkv->outputs();
        void* attended = workspace;
        char* qkv = after(workspace, one.o->K);
        multiply(*one.qkv, hidden, one.input_norm, nullptr, qkv, kQkv);
        if (const Delta& delta = one.delta; delta.rule != nullptr) {
            void* gates = after(qkv, size);
            multiply(*delta.gates, hidden, one.input_norm, nullptr, gates);
            kernels.delta(pool, {delta.rule, qkv, size, gates, delta.gates->outputs(), type, attended, delta.conv, delta.conv_stride,
                                 delta.state, delta.state_stride, batch.sequences, batch.starts, batch.lengths, batch.places});
        } else {
            Cache stored = one.cache;
            if (one.shared) stored.heads = 0;
            kernels.rope_store(pool, {qkv, batch.tokens, size, type, stack.heads, stored, batch.positions, batch.slots, one.cos_sin, one.rotary,
                                      one.q_norm, one.k_norm, stack.eps, stack.offset, one.values.norm, one.values.keys_only, one.values.moved});
            kernels.attention(pool, {qkv, size, attended, type, stack.heads, one.cache, batch.sequences, batch.starts, batch.lengths,
                                     batch.tables, batch.table_width, stack.scale, one.window, stack.cap, one.sinks});
            const int64_t gate = (stack.heads + 2 * one.cache.heads) * one.cache.dim;  // there are such where more is projected
            if (gate < size)
                kernels.sigmoid_mul(pool, {qkv + gate * item_size(type), batch.tokens, one.o->K, size, type, nullptr, 0, 0, attended, attended});
        }
        add(*one.o, attended, one.attention_norm, qkv, hidden, kO);
        if (one.mixture != nullptr) {
            kernels.mixture(pool, {one.mixture, hidden, batch.tokens, type, one.post_norm, stack.eps, stack.offset, hidden});
        } else {
            multiply(*one.gate_up, hidden, one.post_norm, nullptr, workspace, kGateUp);
            void* spare = after(workspace, one.down->K);
            if (const Beside& beside = one.beside; beside.mixture != nullptr) {
                const int64_t columns = one.down->outputs();
                void* mixed = after(spare, columns);
                kernels.mixture(pool, {beside.mixture, hidden, batch.tokens, type, beside.norm, stack.eps, stack.offset, mixed, true});
                normalize(mixed, columns, beside.mixture_norm, nullptr, mixed);
                add(*one.down, workspace, beside.mlp_norm, spare, mixed, kDown);
                normalize(mixed, columns, one.mlp_norm, hidden, hidden);
            } else {
                add(*one.down, workspace, one.mlp_norm, spare, hidden, kDown);
            }
        }
        if (one.told.gate != nullptr) {
            const int64_t features = one.told.gate->outputs();
            multiply(*one.told.gate, hidden, nullptr, nullptr, workspace);
            kernels.gelu_by(pool, {told, batch.tokens, features, batch.told_stride, type, nullptr, 0, 0, workspace, workspace});
            add(*one.told.down, workspace, one.told.norm, after(workspace, features), hidden);
            told += features * item_size(type);
        }
        if (one.scalar != nullptr)
            kernels.scale(pool, {hidden, batch.tokens, one.o->outputs(), one.o->outputs(), type, one.scalar, 0, 0, nullptr, hidden});
        ++number;
    }
}

}  // namespace appliance
