// What a processor can do at most: the floor that benchmarks are measured against.

#pragma once

#include "isa.h"

namespace metaprune {

// Operations per second (two for a multiply-add) of independent multiply-adds in registers, measured on the
// calling thread for about `seconds`: of floats, or of bfloat16 pairs where `isa` multiplies them.
double peak_flops(Isa isa, double seconds, bool bf16);

}  // namespace metaprune
