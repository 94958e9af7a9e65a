// Products by tiles of 16 rows (Intel AMX).
#pragma once
#include "tiles.h"

namespace appliance {
namespace ISA {

INLINE void start_tiles(const Linear&, int64_t) {}
INLINE void stop_tiles(const Linear&, int64_t) {}

}  // namespace ISA
}  // namespace appliance
