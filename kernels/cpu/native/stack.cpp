#include "stack.h"

#include <algorithm>

namespace appliance {

int64_t Stack::width() const {
    int64_t most = 0;
    for (const Layer& one : layers) {
        const int64_t attended = one.attention_norm == nullptr ? 0 : one.o->outputs(), mixed = one.mlp_norm == nullptr ? 0 : one.down->outputs();
        most = std::max({most, one.o->K + std::max(one.qkv->outputs(), attended), one.mixture != nullptr ? 0 : one.gate_up->outputs() + mixed});
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
        // Attention's result, then q, k and v; later the gated product, when those are no longer needed. Behind what is read of
        // these is room for what is normalized before it is added.
        const int64_t size = one.qkv->outputs();
        void* attended = workspace;
        void* qkv = static_cast<char*>(workspace) + batch.tokens * one.o->K * item_size(type);
        multiply(*one.qkv, hidden, one.input_norm, nullptr, qkv);
        kernels.rope_store(pool, {qkv, batch.tokens, size, type, stack.heads, one.cache, batch.positions, batch.slots, one.cos_sin,
                                  stack.rotary, one.q_norm, one.k_norm, stack.eps, stack.offset});
        kernels.attention(pool, {qkv, size, attended, type, stack.heads, one.cache, batch.sequences, batch.starts, batch.lengths,
                                 batch.tables, batch.table_width, stack.scale, one.window, stack.cap, one.sinks});
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
