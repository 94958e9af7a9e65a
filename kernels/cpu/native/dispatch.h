// Which instruction sets this binary has and this processor runs.
#pragma once
#include <string>
#include <vector>

#include "types.h"

namespace appliance {

// Names of what can run here, best first.
std::vector<std::string> available();

// The kernels of an instruction set that is available; null for another name.
const Kernels* find_kernels(const std::string& name);

}  // namespace appliance
