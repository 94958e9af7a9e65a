// All decoder layers of a step in one call: the operators of kernels/ops.py in the order of models/decoder.py.
#pragma once
#include <vector>

#include "types.h"

namespace appliance {

// What a layer of the gated delta rule has in place of attention; qkv is then of queries, keys, values and z.
struct Delta {
    const DeltaRule* rule;  // null: the layer is one of attention
    const Linear* gates;    // of b and a
    float* conv;            // these as in DeltaArgs
    int64_t conv_stride;
    float* state;
    int64_t state_stride;
};

// A mixture beside an MLP: what it reads, what it gives, and what the MLP gives are normalized.
struct Beside {
    const Mixture* mixture;  // null: there is none
    const void *norm, *mixture_norm, *mlp_norm;
};

// What a layer makes of what it is told of each token.
struct Told {
    const Linear *gate, *down;  // null: it is told nothing
    const void* norm;
};

// Values of a layer, where they are normalized: `keys_only` and `moved` as in RopeStoreArgs.
struct Values {
    const void* norm;
    bool keys_only;
    int64_t moved;
};

// One layer; norms are in the type of the activations, null where the model has none.
struct Layer {
    const Linear *qkv, *o, *gate_up, *down;  // gate_up and down are null where there is a mixture
    const Mixture* mixture;
    const void *input_norm, *post_norm, *q_norm, *k_norm;
    const void *attention_norm, *mlp_norm;  // of what attention and the MLP add
    const float* cos_sin;
    int64_t rotary;
    Cache cache;
    bool shared;  // it is another layer's: qkv is of queries alone
    Values values;
    int64_t window;  // 0: none
    const void* sinks;  // of attention; null: none
    Delta delta;
    Beside beside;
    Told told;
    const void* scalar;  // what the layer gives is multiplied by it; null: 1
};

// What an adapter adds to the products of a layer; null: nothing.
enum Slot { kQkv, kO, kGateUp, kDown, kSlots };
struct AdapterLayer {
    const Linear *a[kSlots] = {}, *b[kSlots] = {};
    std::vector<int32_t> spans[kSlots];
};
struct Adapter {
    std::vector<AdapterLayer> layers;
    void add(int64_t layer, int64_t slot, const Linear& a, const Linear& b);
};

// Rows of a step that have one, as in Added.
struct Adapted {
    const Adapter* adapter;
    const int64_t* rows;
    int64_t first, count;
};

struct Stack {
    std::vector<Layer> layers;
    Type type;       // of activations
    int64_t heads;   // of queries
    float eps, offset;  // of norms
    float scale, cap;   // of attention's scores; cap 0: none
    int64_t width() const;  // elements of workspace that a token needs
};

// A step's batch, as PagedBatch has it.
struct Batch {
    int64_t tokens, sequences;
    const int64_t *positions, *slots;
    const int32_t *starts, *lengths, *tables;
    int64_t table_width;
    const int32_t* places;  // of the sequences' states; null where no layer has any
    const void* told;       // features for each layer, those of a token together, and tokens `told_stride` elements apart
    int64_t told_stride;
    const std::vector<Adapted>& adapted;
};

// hidden [tokens, hidden] is overwritten with what the last layer gives; workspace: tokens * width() elements.
void run_layers(Pool&, const Kernels&, const Stack&, const Batch&, void* hidden, void* workspace);

}  // namespace appliance
