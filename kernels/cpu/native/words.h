// Published words of 4-bit codes in the order of outputs, as quant/formats/awq.py makes it with torch, whose words it has.
#pragma once
#include <cstdint>

namespace appliance {

// AutoAWQ's words [inputs, width] to the canonical nibbles [8 * width, bytes], bytes = 4 * ceil(inputs / 8); those behind the inputs
// are zero.
void turn_awq(const uint32_t* words, int64_t inputs, int64_t width, uint8_t* to);

}  // namespace appliance
