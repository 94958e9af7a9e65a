// The kernels of one instruction set: compiled once for each, with ISA naming the namespace.
#include "pool.h"
#include "vec.h"

#include "attention.h"
#include "delta.h"
#include "matmul.h"
#include "mixture.h"
#include "rows.h"
#include "small.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

namespace appliance {
namespace ISA {

extern const Kernels kernels;
const Kernels kernels = {TEXT(ISA), matmul, mixture, attention, delta, rope_store, rms_norm, gate_mul<false>, gate_mul<true>, sigmoid_mul, gelu_by, scale, embed, argmax, kth_largest, round_rows};

}  // namespace ISA
}  // namespace appliance
