// The activations: none, relu and relu6.

#pragma once

namespace metaprune {

// y = min(max(x, low), high); a NaN stays one.
struct Clamp {
    float low, high;
};

}  // namespace metaprune
