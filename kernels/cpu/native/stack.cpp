#include "stack.h"

#include <algorithm>

namespace appliance {

int64_t Stack::width() const {
    int64_t most = 0;
    for (const Layer& one : layers) {
        const int64_t attended = one.attention_norm == nullptr ? 0 : one.o->outputs(), mixed = one.mlp_norm == nullptr ? 0 : one.down->outputs();
        const int64_t read = one.qkv->outputs() + (one.delta.rule == nullptr ? 0 : one.delta.gates->outputs());
        most = std::max({most, one.o->K + std::max(read, attended), one.mixture != nullptr ? 0 : one.gate_up->outputs() + mixed});
    }
    return most;
}

void run_layers(Pool& pool, const Kernels& kernels, const Stack& stack, const Batch& batch, void* hidden, void* workspace) {
    const Type type = stack.type;
    const auto multiply = [&](const Linear& w, const void* x, const void* norm, const void* residual, void* out) {
        kernels.matmul(pool, {&w, x, batch.tokens, w.K, type, norm, stack.eps, stack.offset, residual, out, type});
    };
    // hidden += w(x), which a norm goes through first where there is one: by way of `spare`.
    const auto add = [&](const Linear& w, const void* x, const void* norm, void* spare) {
        if (norm == nullptr) return multiply(w, x, nullptr, hidden, hidden);
        multiply(w, x, nullptr, nullptr, spare);
        kernels.rms_norm(pool, {spare, batch.tokens, w.outputs(), w.outputs(), type, norm, stack.eps, stack.offset, hidden, hidden});
    };
    for (const Layer& one : stack.layers) {
        // Attention's result, then q, k and v, and gates; later the gated product, when those are no longer needed. Behind what is read of
        // these is room for what is normalized before it is added.
        const int64_t size = one.qkv->outputs();
        void* attended = workspace;
        char* qkv = static_cast<char*>(workspace) + batch.tokens * one.o->K * item_size(type);
        multiply(*one.qkv, hidden, one.input_norm, nullptr, qkv);
        if (const Delta& delta = one.delta; delta.rule != nullptr) {
            void* gates = qkv + batch.tokens * size * item_size(type);
            multiply(*delta.gates, hidden, one.input_norm, nullptr, gates);
            kernels.delta(pool, {delta.rule, qkv, size, gates, delta.gates->outputs(), type, attended, delta.conv, delta.conv_stride,
                                 delta.state, delta.state_stride, batch.sequences, batch.starts, batch.lengths, batch.places});
        } else {
            kernels.rope_store(pool, {qkv, batch.tokens, size, type, stack.heads, one.cache, batch.positions, batch.slots, one.cos_sin,
                                      stack.rotary, one.q_norm, one.k_norm, stack.eps, stack.offset});
            kernels.attention(pool, {qkv, size, attended, type, stack.heads, one.cache, batch.sequences, batch.starts, batch.lengths,
                                     batch.tables, batch.table_width, stack.scale, one.window, stack.cap, one.sinks});
            const int64_t gate = (stack.heads + 2 * one.cache.heads) * one.cache.dim;  // there are such where more is projected
            if (gate < size)
                kernels.sigmoid_mul(pool, {qkv + gate * item_size(type), batch.tokens, one.o->K, size, type, nullptr, 0, 0, attended, attended});
        }
        add(*one.o, attended, one.attention_norm, qkv);
        if (one.mixture != nullptr) {
            kernels.mixture(pool, {one.mixture, hidden, batch.tokens, type, one.post_norm, stack.eps, stack.offset, hidden});
            continue;
        }
        multiply(*one.gate_up, hidden, one.post_norm, nullptr, workspace);
        add(*one.down, workspace, one.mlp_norm, static_cast<char*>(workspace) + batch.tokens * one.down->K * item_size(type));
    }
}

}  // namespace appliance
