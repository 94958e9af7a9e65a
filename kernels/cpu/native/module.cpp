// The Python module: thin wrappers that take addresses. Nothing here knows torch; kernels/cpu/native_ops.py keeps tensors alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <stdexcept>

#include "dispatch.h"
#include "pack.h"
#include "pool.h"
#include "stack.h"
#include "types.h"
#include "words.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace appliance {
namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// A mixture, and the lists that it points into.
struct Experts {
    std::vector<const Linear*> gate_up, down;
    Mixture mixture;

    Experts(const Linear& router, std::vector<const Linear*> gate_ups, std::vector<const Linear*> downs, int64_t active, bool normalized,
            bool sigmoid, uintptr_t correction, int64_t groups, int64_t chosen_groups, int64_t best, float least, float scale, const Linear* shared_gate_up,
            const Linear* shared_down, const Linear* shared_gate, uintptr_t router_norm, uintptr_t gains)
        : gate_up(std::move(gate_ups)), down(std::move(downs)),
          mixture{&router, gate_up.data(), down.data(), int64_t(down.size()), active, normalized, sigmoid, at<float>(correction), groups,
                  chosen_groups, best, least, scale, shared_gate_up, shared_down, shared_gate, at<void>(router_norm), at<float>(gains)} {
        if (best < 1 || best > 2) throw std::invalid_argument("the largest one or two of a group of experts are summed, not " + std::to_string(best));
        if (groups > kMostGroups) throw std::invalid_argument(std::to_string(groups) + " groups of experts; at most 64 are supported");
    }
    Experts(const Experts&) = delete;
};

// One set of kernels and the threads that run them. Calls from several Python threads (a loader's) take turns.
struct Machine {
    const Kernels* kernels;
    std::unique_ptr<Pool> pool;
    std::mutex mutex;

    Machine(const std::string& isa, int threads, bool pin) : kernels(find_kernels(isa)) {
        if (kernels == nullptr) throw std::invalid_argument("no kernels for '" + isa + "' on this processor");
        pool = std::make_unique<Pool>(threads, pin);
        if (pin) spread_memory();
    }

    void matmul(const Linear& w, uintptr_t x, int64_t rows, int64_t stride, int type, uintptr_t norm, float eps, float offset,
                uintptr_t residual, uintptr_t out, int out_type) {
        const std::lock_guard lock(mutex);
        kernels->matmul(*pool, {&w, at<void>(x), rows, stride, Type(type), at<void>(norm), eps, offset, at<void>(residual), at<void>(out), Type(out_type)});
    }

    void mixture(const Experts& experts, uintptr_t x, int64_t rows, int type, uintptr_t norm, float eps, float offset, uintptr_t out,
                 bool alone) {
        const std::lock_guard lock(mutex);
        kernels->mixture(*pool, {&experts.mixture, at<void>(x), rows, Type(type), at<void>(norm), eps, offset, at<void>(out), alone});
    }

    void attention(uintptr_t q, int64_t q_stride, uintptr_t out, int type, int64_t q_heads, const Cache& cache, int64_t sequences,
                   uintptr_t starts, uintptr_t lengths, uintptr_t tables, int64_t width, float scale, int64_t window, float cap, uintptr_t sinks) {
        const std::lock_guard lock(mutex);
        kernels->attention(*pool, {at<void>(q), q_stride, at<void>(out), Type(type), q_heads, cache, sequences, at<int32_t>(starts),
                                   at<int32_t>(lengths), at<int32_t>(tables), width, scale, window, cap, at<void>(sinks)});
    }

    void sigmoid_mul(uintptr_t x, uintptr_t gate, int64_t rows, int64_t columns, int64_t stride, int type, uintptr_t out) {
        const std::lock_guard lock(mutex);
        kernels->sigmoid_mul(*pool, {at<void>(gate), rows, columns, stride, Type(type), nullptr, 0, 0, at<void>(x), at<void>(out)});
    }

    void delta(const DeltaRule& rule, uintptr_t x, int64_t stride, uintptr_t gates, int64_t gates_stride, int type, uintptr_t out, uintptr_t conv, int64_t conv_stride, uintptr_t state,
               int64_t state_stride, int64_t sequences, uintptr_t starts, uintptr_t lengths, uintptr_t places) {
        const std::lock_guard lock(mutex);
        kernels->delta(*pool, {&rule, at<void>(x), stride, at<void>(gates), gates_stride, Type(type), at<void>(out), at<float>(conv), conv_stride, at<float>(state), state_stride, sequences,
                               at<int32_t>(starts), at<int32_t>(lengths), at<int32_t>(places)});
    }

    void rope_store(uintptr_t qkv, int64_t tokens, int64_t stride, int type, int64_t q_heads, const Cache& cache, uintptr_t positions,
                    uintptr_t slots, uintptr_t cos_sin, int64_t rotary, uintptr_t q_norm, uintptr_t k_norm, float eps, float offset) {
        const std::lock_guard lock(mutex);
        kernels->rope_store(*pool, {at<void>(qkv), tokens, stride, Type(type), q_heads, cache, at<int64_t>(positions), at<int64_t>(slots),
                                    at<float>(cos_sin), rotary, at<void>(q_norm), at<void>(k_norm), eps, offset});
    }

    void rms_norm(uintptr_t x, int64_t rows, int64_t columns, int64_t stride, int type, uintptr_t norm, float eps, float offset,
                  uintptr_t residual, uintptr_t out) {
        const std::lock_guard lock(mutex);
        kernels->rms_norm(*pool, {at<void>(x), rows, columns, stride, Type(type), at<void>(norm), eps, offset, at<void>(residual), at<void>(out)});
    }

    void gate_mul(bool gelu, uintptr_t x, int64_t rows, int64_t columns, int64_t stride, int type, uintptr_t out) {
        const std::lock_guard lock(mutex);
        (gelu ? kernels->gelu_mul : kernels->silu_mul)(*pool, {at<void>(x), rows, columns, stride, Type(type), nullptr, 0, 0, nullptr, at<void>(out)});
    }

    void embed_rows(uintptr_t rows, int64_t columns, uintptr_t ids, int64_t tokens, uintptr_t out, int type) {
        const std::lock_guard lock(mutex);
        kernels->embed(*pool, {nullptr, at<void>(rows), columns, at<int64_t>(ids), tokens, at<void>(out), Type(type)});
    }

    void embed_packed(const Linear& table, uintptr_t ids, int64_t tokens, uintptr_t out, int type) {
        const std::lock_guard lock(mutex);
        kernels->embed(*pool, {&table, nullptr, table.K, at<int64_t>(ids), tokens, at<void>(out), Type(type)});
    }

    void argmax(uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t values, uintptr_t ids) {
        const std::lock_guard lock(mutex);
        kernels->argmax(*pool, {at<float>(x), rows, columns, stride, at<float>(values), at<int64_t>(ids)});
    }

    float kth_largest(uintptr_t x, int64_t n, int64_t k) {
        const std::lock_guard lock(mutex);
        return kernels->kth_largest(*pool, at<float>(x), n, k);
    }

    void layers(const Stack& stack, int64_t tokens, int64_t sequences, uintptr_t positions, uintptr_t slots, uintptr_t starts, uintptr_t lengths,
                uintptr_t tables, int64_t table_width, uintptr_t places, uintptr_t told, int64_t told_stride, const std::vector<Adapted>& adapted, uintptr_t hidden,
                uintptr_t workspace) {
        const std::lock_guard lock(mutex);
        run_layers(*pool, *kernels, stack, {tokens, sequences, at<int64_t>(positions), at<int64_t>(slots), at<int32_t>(starts), at<int32_t>(lengths),
                                            at<int32_t>(tables), table_width, at<int32_t>(places), at<void>(told), told_stride, adapted}, at<void>(hidden), at<void>(workspace));
    }

    void pack(const Linear& w, uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t to_codes, uintptr_t to_scales, uintptr_t to_zeros) {
        const std::lock_guard lock(mutex);
        appliance::pack(*pool, w, {at<uint8_t>(codes), at<void>(scales), at<uint8_t>(zeros), at<uint8_t>(to_codes), at<void>(to_scales), at<uint8_t>(to_zeros)});
    }
};

void round_rows(const std::string& isa, uintptr_t x, int type, int64_t rows, int64_t columns, int64_t group, int64_t bits, uintptr_t codes,
                uintptr_t scales, uintptr_t zeros) {
    const Kernels* kernels = find_kernels(isa);
    if (kernels == nullptr) throw std::invalid_argument("no kernels for '" + isa + "' on this processor");
    kernels->round_rows({at<void>(x), Type(type), rows, columns, group, bits, at<uint8_t>(codes), at<void>(scales), at<uint8_t>(zeros)});
}

Linear make_linear(int64_t N, int64_t K, int codes, int scale_type, int64_t group, bool gated, bool gelu, float limit, float slope, bool quantize,
                   bool per_token, int round_to, uintptr_t data, uintptr_t scales, uintptr_t zeros, uintptr_t bias, uintptr_t factors, uintptr_t perm) {
    Linear w;
    w.N = N;
    w.K = K;
    w.codes = Codes(codes);
    w.scale_type = Type(scale_type);
    w.group = group;
    w.gated = gated;
    w.gelu = gelu;
    w.limit = limit;
    w.slope = slope;
    w.quantize = quantize;
    w.per_token = per_token;
    w.round_to = Type(round_to);
    w.data = at<uint8_t>(data);
    w.scales = at<void>(scales);
    w.zeros = at<uint8_t>(zeros);
    w.bias = at<float>(bias);
    w.factors = at<float>(factors);
    w.perm = at<int32_t>(perm);
    finish(w);
    return w;
}

}  // namespace

NB_MODULE(_native, m) {
    using guard = nb::call_guard<nb::gil_scoped_release>;
    nb::set_leak_warnings(false);  // a model may well live until the interpreter ends
    m.doc() = "Kernels for the CPU. Arguments that are tensors are addresses; kernels/cpu/native_ops.py is the interface to use.";
    m.def("available", &available, "Instruction sets that this processor runs, best first.");
    m.def("physical_cores", &physical_cores, "CPU numbers of the physical cores this process may use.");
    m.def("turn_awq", [](uintptr_t words, int64_t inputs, int64_t width, uintptr_t to) { turn_awq(at<uint32_t>(words), inputs, width, at<uint8_t>(to)); }, guard());
    m.def("round_rows", &round_rows, guard());

    nb::class_<Linear>(m, "Linear")
        .def("__init__", [](Linear* self, int64_t N, int64_t K, int codes, int scale_type, int64_t group, bool gated, bool gelu, float limit,
                            float slope, bool quantize, bool per_token, int round_to, uintptr_t data, uintptr_t scales, uintptr_t zeros, uintptr_t bias, uintptr_t factors,
                            uintptr_t perm) {
            new (self) Linear(make_linear(N, K, codes, scale_type, group, gated, gelu, limit, slope, quantize, per_token, round_to, data, scales, zeros, bias, factors, perm));
        }, nb::kw_only(), "N"_a, "K"_a, "codes"_a, "scale_type"_a, "group"_a, "gated"_a, "gelu"_a, "limit"_a, "slope"_a, "quantize"_a,
           "per_token"_a, "round_to"_a, "data"_a, "scales"_a, "zeros"_a, "bias"_a, "factors"_a, "perm"_a)
        .def_ro("panels", &Linear::panels)
        .def_ro("segments", &Linear::segments)
        .def_ro("unit", &Linear::unit)
        .def_prop_ro("floating", [](const Linear& w) { return w.codes != Codes::int4 && w.codes != Codes::int8; })
        .def_prop_ro("code_bytes", &code_bytes);

    nb::class_<Cache>(m, "Cache").def("__init__", [](Cache* self, uintptr_t k, uintptr_t v, uintptr_t k_scale, uintptr_t v_scale, int type,
                                                     int64_t block_size, int64_t heads, int64_t dim, float k_given, float v_given) {
        if (dim > kMostFeatures) throw std::invalid_argument("heads of " + std::to_string(dim) + " features; at most 1024 are supported");
        new (self) Cache{at<void>(k), at<void>(v), at<void>(k_scale), at<void>(v_scale), Type(type), block_size, heads, dim, k_given, v_given};
    });

    nb::class_<DeltaRule>(m, "DeltaRule")
        .def("__init__", [](DeltaRule* self, int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim, int64_t kernel, uintptr_t conv,
                            uintptr_t rate, uintptr_t dt_bias, uintptr_t norm, float eps) {
            new (self) DeltaRule{key_heads, value_heads, key_dim, value_dim, kernel, at<float>(conv), at<float>(rate), at<float>(dt_bias), at<float>(norm), eps};
        }, nb::kw_only(), "key_heads"_a, "value_heads"_a, "key_dim"_a, "value_dim"_a, "kernel"_a, "conv"_a, "rate"_a, "dt_bias"_a, "norm"_a, "eps"_a);

    nb::class_<Delta>(m, "Delta")
        .def("__init__", [](Delta* self, const DeltaRule& rule, const Linear& gates, uintptr_t conv, int64_t conv_stride, uintptr_t state, int64_t state_stride) {
            new (self) Delta{&rule, &gates, at<float>(conv), conv_stride, at<float>(state), state_stride};
        }, nb::kw_only(), "rule"_a, "gates"_a, "conv"_a, "conv_stride"_a, "state"_a, "state_stride"_a);

    nb::class_<Experts>(m, "Experts")
        .def(nb::init<const Linear&, std::vector<const Linear*>, std::vector<const Linear*>, int64_t, bool, bool, uintptr_t, int64_t, int64_t,
                      int64_t, float, float, const Linear*, const Linear*, const Linear*, uintptr_t, uintptr_t>(),
             nb::kw_only(), "router"_a, "gate_up"_a, "down"_a, "active"_a, "normalized"_a, "sigmoid"_a, "correction"_a, "groups"_a,
             "chosen_groups"_a, "best"_a, "least"_a, "scale"_a, "shared_gate_up"_a.none(), "shared_down"_a.none(), "shared_gate"_a.none(),
             "router_norm"_a, "gains"_a);

    nb::class_<Beside>(m, "Beside")
        .def("__init__", [](Beside* self, const Experts& experts, uintptr_t norm, uintptr_t mixture_norm, uintptr_t mlp_norm) {
            new (self) Beside{&experts.mixture, at<void>(norm), at<void>(mixture_norm), at<void>(mlp_norm)};
        }, nb::kw_only(), "experts"_a, "norm"_a, "mixture_norm"_a, "mlp_norm"_a);

    nb::class_<Told>(m, "Told")
        .def("__init__", [](Told* self, const Linear& gate, const Linear& down, uintptr_t norm) {
            new (self) Told{&gate, &down, at<void>(norm)};
        }, nb::kw_only(), "gate"_a, "down"_a, "norm"_a);

    nb::class_<Values>(m, "Values")
        .def("__init__", [](Values* self, uintptr_t norm, bool keys_only, int64_t moved) {
            new (self) Values{at<void>(norm), keys_only, moved};
        }, nb::kw_only(), "norm"_a, "keys_only"_a, "moved"_a);

    nb::class_<Layer>(m, "Layer")
        .def("__init__", [](Layer* self, const Linear& qkv, const Linear& o, const Linear* gate_up, const Linear* down, const Experts* experts,
                            uintptr_t input_norm, uintptr_t post_norm, uintptr_t q_norm, uintptr_t k_norm, uintptr_t attention_norm,
                            uintptr_t mlp_norm, uintptr_t cos_sin, int64_t rotary, const Cache* cache, bool shared, const Values* values,
                            int64_t window, uintptr_t sinks, const Delta* delta, const Beside* beside, const Told* told, uintptr_t scalar) {
            new (self) Layer{&qkv, &o, gate_up, down, experts == nullptr ? nullptr : &experts->mixture, at<void>(input_norm), at<void>(post_norm),
                             at<void>(q_norm), at<void>(k_norm), at<void>(attention_norm), at<void>(mlp_norm), at<float>(cos_sin), rotary,
                             cache == nullptr ? Cache{} : *cache, shared, values == nullptr ? Values{} : *values, window, at<void>(sinks),
                             delta == nullptr ? Delta{} : *delta, beside == nullptr ? Beside{} : *beside, told == nullptr ? Told{} : *told,
                             at<void>(scalar)};
        }, nb::kw_only(), "qkv"_a, "o"_a, "gate_up"_a = nb::none(), "down"_a = nb::none(), "experts"_a = nb::none(), "input_norm"_a, "post_norm"_a,
           "q_norm"_a, "k_norm"_a, "attention_norm"_a, "mlp_norm"_a, "cos_sin"_a, "rotary"_a, "cache"_a = nb::none(), "shared"_a,
           "values"_a = nb::none(), "window"_a, "sinks"_a, "delta"_a = nb::none(), "beside"_a = nb::none(), "told"_a = nb::none(), "scalar"_a);

    nb::class_<Adapter>(m, "Adapter", "Additions to the products of layers: queries, keys and values; output; gate and up; down.")
        .def("__init__", [](Adapter* self, size_t layers) { new (self) Adapter{std::vector<AdapterLayer>(layers)}; }, "layers"_a)
        .def("add", [](Adapter& self, int64_t layer, int64_t slot, const Linear& a, const Linear& b) {
            if (slot < 0 || slot >= kSlots) throw std::out_of_range("a layer has four products");
            self.add(layer, slot, a, b);
        }, "layer"_a, "slot"_a, "a"_a, "b"_a);

    nb::class_<Adapted>(m, "Adapted").def("__init__", [](Adapted* self, const Adapter& adapter, uintptr_t rows, int64_t first, int64_t count) {
        new (self) Adapted{&adapter, at<int64_t>(rows), first, count};
    });

    nb::class_<Stack>(m, "Stack")
        .def("__init__", [](Stack* self, const std::vector<Layer>& layers, int type, int64_t heads, float eps, float offset, float scale,
                            float cap) {
            new (self) Stack{layers, Type(type), heads, eps, offset, scale, cap};
        }, "layers"_a, nb::kw_only(), "type"_a, "heads"_a, "eps"_a, "offset"_a, "scale"_a, "cap"_a)
        .def_prop_ro("width", &Stack::width);

    nb::class_<Machine>(m, "Machine")
        .def(nb::init<const std::string&, int, bool>(), "isa"_a, "threads"_a, "pin"_a)
        .def_prop_ro("name", [](const Machine& self) { return std::string(self.kernels->name); })
        .def_prop_ro("threads", [](const Machine& self) { return self.pool->size(); })
        .def_prop_ro("scratch_bytes", [](const Machine& self) { return self.pool->scratch_bytes(); })
        .def("matmul", &Machine::matmul, guard())
        .def("mixture", &Machine::mixture, guard())
        .def("attention", &Machine::attention, guard())
        .def("delta", &Machine::delta, guard())
        .def("rope_store", &Machine::rope_store, guard())
        .def("rms_norm", &Machine::rms_norm, guard())
        .def("gate_mul", &Machine::gate_mul, guard())
        .def("sigmoid_mul", &Machine::sigmoid_mul, guard())
        .def("embed_rows", &Machine::embed_rows, guard())
        .def("embed_packed", &Machine::embed_packed, guard())
        .def("argmax", &Machine::argmax, guard())
        .def("kth_largest", &Machine::kth_largest, guard())
        .def("layers", &Machine::layers, guard())
        .def("pack", &Machine::pack, guard());
}

}  // namespace appliance
