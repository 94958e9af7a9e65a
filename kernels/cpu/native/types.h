// Plain values that cross from the bindings to the kernels of one instruction set. No code that a compiler could vectorize here.
#pragma once
#include <cstdint>

namespace appliance {

class Pool;

// f8: e4m3fn; f8e5: e5m2; i4: two in a byte; e8: e8m0fnu, powers of two
enum class Type : int { f32 = 0, bf16 = 1, f16 = 2, f8 = 3, i8 = 4, f8e5 = 5, i4 = 6, e8 = 7 };

inline int64_t item_size(Type t) { return t == Type::f32 ? 4 : t == Type::bf16 || t == Type::f16 ? 2 : 1; }

constexpr int64_t kPanel = 64;     // outputs side by side in memory
constexpr int64_t kMostFeatures = 1024;  // of a head; the bindings check it
constexpr int64_t kSegment = 128;  // inputs that share an activation scale, at most

enum class Codes : int { int4 = 0, int8 = 1, f8 = 2, bf16 = 3, f16 = 4, f32 = 5, fp4 = 6 };  // fp4: e2m1

// A weight in panels of 64 outputs; see layout.h for the order inside. Storage belongs to the caller.
struct Linear {
    int64_t N = 0, K = 0;        // as published (both halves of a gated weight)
    int64_t panels = 0;
    Codes codes = Codes::int4;
    Type scale_type = Type::f32;
    int64_t group = 0;           // inputs a scale holds for
    int64_t per_group = 0;       // segments in a group
    int64_t segments = 0, unit = 0;  // unit: inputs in a segment, padded
    bool gated = false;          // panels alternate: gate, up; the product is silu(gate) * up
    bool gelu = false;           // ... or gelu(gate) * up, in the approximation by tanh
    float limit = 0, slope = 0;  // ... or, with a limit, what clamped() of vec.h makes of both
    bool quantize = false;       // activations are rounded to int8
    bool per_token = false;      // ... with one scale a token, as the checkpoint asks
    Type round_to = Type::f32;   // expanded weights are rounded to this
    const uint8_t* data = nullptr;
    const void* scales = nullptr;    // [panels][groups][64]
    const uint8_t* zeros = nullptr;  // [panels][groups][64]; null: 2^(bits - 1), or 12 of fp4
    const float* bias = nullptr;     // [panels * 64]
    const float* factors = nullptr;  // [panels * 64]: of the sums, before the bias; null: 1
    const int32_t* perm = nullptr;   // [K]: input j of the packed order is the original input perm[j]
    int64_t outputs() const { return gated ? N / 2 : N; }
    bool four() const { return codes == Codes::int4 || codes == Codes::fp4; }  // bits
    int64_t groups() const { return (K + group - 1) / group; }
};

// What an adapter adds to a product, for some of its rows: all of them in one run of kBlock rows from a multiple of that on.
struct Added {
    const Linear *a, *b;   // dense, [ranks, K] and [N, ranks]; where the weight is gated, N / 2 is a multiple of kPanel
    const int64_t* rows;   // [count], rising; null: they follow `first`
    int64_t first, count;
    const int32_t* spans;  // for each panel of B the first rank that counts, an even one, and the one behind the last: zeros beside
};

struct MatmulArgs {
    const Linear* weight;
    const void* x;         // [rows, K]
    int64_t rows;
    int64_t stride;        // elements from one row of x to the next
    Type type;             // of x, norm and residual
    const void* norm;      // [K] or null: x is RMS-normalized first
    float eps, offset;     // offset: added to the weights of the norm
    const void* residual;  // [rows, outputs] or null
    void* out;             // [rows, outputs]
    Type out_type;
    const int32_t* gather = nullptr;  // [rows] or null: the row of x that is the product's
    const Added* added = nullptr;     // not where rows are gathered
    int64_t additions = 0;
};

constexpr int64_t kMostGroups = 64;  // of experts; the bindings check it

// The experts of a layer, all of the same shapes; and an MLP of its own shape that every token goes through.
struct Mixture {
    const Linear* router;         // [experts, hidden]
    const Linear* const* gate_up; // [experts], gated
    const Linear* const* down;    // [experts]
    int64_t experts, active;      // a token goes through so many of them
    bool normalized;              // the shares of these are made to add up to 1
    bool sigmoid = false;         // scores are sigmoids of the router's products, not a softmax over all
    const float* correction = nullptr;     // [experts]: added to scores for the choice alone; null: 0
    int64_t groups = 1, chosen_groups = 1; // experts stand in so many groups, and a token's are from those of the largest sums
    int64_t best = 2;                      // of so many, one or two: the largest of a group
    float least = 0, scale = 1;   // shares are of no less than this sum, and are multiplied with that
    const Linear *shared_gate_up = nullptr, *shared_down = nullptr;  // that MLP; null: there is none
    const Linear* shared_gate = nullptr;   // [1, hidden]: the sigmoid of its product is the share of it; null: 1
    const void* router_norm = nullptr;     // [hidden], of the type of x: what the router reads; null: what the experts do
    const float* gains = nullptr;          // [experts]: shares are multiplied by them at last; null: 1
};

struct MixtureArgs {
    const Mixture* mixture;
    const void* x;         // [rows, hidden], what the sum is added to
    int64_t rows;
    Type type;             // of x, norm and out
    const void* norm;      // [hidden]
    float eps, offset;
    void* out;             // [rows, hidden]; may be x
    bool alone = false;    // the sum is added to nothing
};

struct Cache {             // one layer's paged cache (kernels/kv_cache.py): [blocks, block_size, heads, dim]
    void* k;
    void* v;
    void* k_scale;         // of codes: [blocks, block_size, heads] float32; i4: pairs of float16, step and least
    void* v_scale;
    Type type;
    int64_t block_size, heads, dim;
    float k_given, v_given;  // the checkpoint's scales; 0: there are none
    bool coded() const { return type != Type::f32 && type != Type::bf16 && type != Type::f16; }
    int64_t row_bytes() const { return type == Type::i4 ? dim / 2 : dim * item_size(type); }  // of one head of a token
};

struct AttentionArgs {
    const void* q;         // [tokens, q_heads, dim], rows `q_stride` elements apart
    int64_t q_stride;
    void* out;             // [tokens, q_heads, dim], contiguous
    Type type;             // of q and out
    int64_t q_heads;
    Cache cache;
    int64_t sequences;
    const int32_t* starts;   // [sequences + 1]: first row of each sequence
    const int32_t* lengths;  // [sequences]: tokens in the cache, this step's included
    const int32_t* tables;   // [sequences, width]
    int64_t width;
    float scale;
    int64_t window;          // 0: none
    float cap;               // of scores: cap * tanh(score / cap); 0: none
    const void* sinks;       // [q_heads] in `type`: one more score each, of no value; null: none
};

struct RopeStoreArgs {
    void* qkv;             // [tokens, (q_heads + 2 * heads) * dim], rows `stride` elements apart; q is rotated in place
    int64_t tokens, stride;
    Type type;
    int64_t q_heads;
    Cache cache;
    const int64_t* positions;  // [tokens]
    const int64_t* slots;      // [tokens]
    const float* cos_sin;      // [positions, rotary]: cosines, then sines
    int64_t rotary;
    const void* q_norm;        // [dim] or null, in `type`
    const void* k_norm;
    float eps, offset;
    const void* v_norm = nullptr;
    bool keys_only = false;    // values are made of keys as they come, of which each head has `moved` pairs of features before the rest
    int64_t moved = 0;
};

struct DeltaRule {         // parameters of a layer of the gated delta rule (kernels/states.py)
    int64_t key_heads, value_heads, key_dim, value_dim, kernel;
    const float* conv;     // [kernel, channels]
    const float* rate;     // [value_heads]
    const float* dt_bias;  // [value_heads]
    const float* norm;     // [value_dim]
    float eps;
    int64_t values() const { return value_heads * value_dim; }
    int64_t channels() const { return 2 * key_heads * key_dim + values(); }
};

struct DeltaArgs {
    const DeltaRule* rule;
    const void* x;           // [tokens, channels + values]: queries, keys, values and z; rows `stride` elements apart
    int64_t stride;
    const void* gates;       // [tokens, 2 * value_heads]: b and a; rows `gates_stride` elements apart
    int64_t gates_stride;
    Type type;               // of these and of out
    void* out;               // [tokens, values], contiguous
    float* conv;             // [places][kernel - 1, channels], places `conv_stride` elements apart
    int64_t conv_stride;
    float* state;            // [places][value_heads, key_dim, value_dim]
    int64_t state_stride;
    int64_t sequences;
    const int32_t* starts;   // [sequences + 1]: first row of each sequence
    const int32_t* lengths;  // [sequences]: tokens that went through, this step's included
    const int32_t* places;   // [sequences]
};

struct RowsArgs {          // row-wise operations on [rows, columns]
    const void* x;
    int64_t rows, columns, stride;
    Type type;
    const void* norm;
    float eps, offset;
    const void* residual;  // as x and contiguous, or null: added to the norm
    void* out;
};

struct EmbedArgs {
    const Linear* table;       // null: dense rows of `rows`
    const void* rows;          // [vocab, columns] in `type`
    int64_t columns;
    const int64_t* ids;
    int64_t tokens;
    void* out;
    Type type;
};

struct ArgmaxArgs {
    const float* x;            // [rows, columns]
    int64_t rows, columns, stride;
    float* values;
    int64_t* ids;
};

// Rows of a table rounded while it is loaded: quant/rows.py says how.
struct RoundArgs {
    const void* x;             // [rows, columns] in `type`
    Type type;
    int64_t rows, columns;
    int64_t group;             // of 4 bits: at most 32 inputs
    int64_t bits;              // 8 or 4
    uint8_t* codes;            // [rows, columns], or [rows, ceil(columns / 2)]
    void* scales;              // float32 [rows], or float16 [groups, rows]
    uint8_t* zeros;            // of 4 bits: [groups, rows]
};

// What one instruction set offers.
struct Kernels {
    const char* name;
    void (*matmul)(Pool&, const MatmulArgs&);
    void (*mixture)(Pool&, const MixtureArgs&);
    void (*attention)(Pool&, const AttentionArgs&);
    void (*delta)(Pool&, const DeltaArgs&);
    void (*rope_store)(Pool&, const RopeStoreArgs&);
    void (*rms_norm)(Pool&, const RowsArgs&);
    void (*silu_mul)(Pool&, const RowsArgs&);
    void (*gelu_mul)(Pool&, const RowsArgs&);
    void (*sigmoid_mul)(Pool&, const RowsArgs&);
    void (*gelu_by)(Pool&, const RowsArgs&);
    void (*scale)(Pool&, const RowsArgs&);
    void (*embed)(Pool&, const EmbedArgs&);
    void (*argmax)(Pool&, const ArgmaxArgs&);
    float (*kth_largest)(Pool&, const float*, int64_t n, int64_t k);
    void (*round_rows)(const RoundArgs&);
};

}  // namespace appliance
