// The instruction set the CPU kernels run in, chosen at run time.

#pragma once

#include <string>

namespace metaprune {

enum class Isa { portable, avx2, avx512 };

// The fastest level of this processor, or the one named by METAPRUNE_ISA (avx512, avx2, portable). Throws
// std::runtime_error if that names no level or one this processor does not have.
Isa chosen_isa();

std::string isa_name(Isa isa);

}  // namespace metaprune
