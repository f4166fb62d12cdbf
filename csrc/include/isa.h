// The instruction set the CPU kernels run in, chosen at run time.

#pragma once

#include <string>
#include <vector>

namespace metaprune {

// Each level includes those before it. avx512_bf16 adds the dot product of bfloat16 pairs, amx matrix tiles.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// The fastest level of this processor, or the one named by METAPRUNE_ISA. Throws std::runtime_error if that
// names no level or one this processor does not have.
Isa chosen_isa();

// The levels this processor has, the fastest first.
std::vector<Isa> supported_isas();

std::string isa_name(Isa isa);

}  // namespace metaprune
