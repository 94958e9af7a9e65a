#include "stack.h"

#include <algorithm>

namespace appliance {

int64_t Stack::width() const {
    int64_t most = 0;
    for (const Layer& one : layers) most = std::max({most, one.o->K + one.qkv->outputs(), one.mixture != nullptr ? 0 : one.gate_up->outputs()});
    return most;
}

void run_layers(Pool& pool, const Kernels& kernels, const Stack& stack, const Batch& batch, void* hidden, void* workspace) {
    const Type type = stack.type;
    const auto multiply = [&](const Linear& w, const void* x, const void* norm, const void* residual, void* out) {
        kernels.matmul(pool, {&w, x, batch.tokens, w.K, type, norm, stack.eps, residual, out, type});
    };
    for (const Layer& one : stack.layers) {
        // Attention's result, then q, k and v; later the gated product, when those are no longer needed.
        const int64_t size = one.qkv->outputs();
        void* attended = workspace;
        void* qkv = static_cast<char*>(workspace) + batch.tokens * one.o->K * item_size(type);
        multiply(*one.qkv, hidden, one.input_norm, nullptr, qkv);
        kernels.rope_store(pool, {qkv, batch.tokens, size, type, stack.heads, one.cache, batch.positions, batch.slots, stack.cos_sin,
                                  stack.rotary, one.q_norm, one.k_norm, stack.eps});
        kernels.attention(pool, {qkv, size, attended, type, stack.heads, one.cache, batch.sequences, batch.starts, batch.lengths,
                                 batch.tables, batch.table_width, stack.scale, one.window});
        multiply(*one.o, attended, nullptr, hidden, hidden);
        if (one.mixture != nullptr) {
            kernels.mixture(pool, {one.mixture, hidden, batch.tokens, type, one.post_norm, stack.eps, hidden});
            continue;
        }
        multiply(*one.gate_up, hidden, one.post_norm, nullptr, workspace);
        multiply(*one.down, workspace, nullptr, hidden, hidden);
    }
}

}  // namespace appliance
