// The Python module kernels._extension. Importing it registers the CPU kernels (ops/); it also tells how
// it was built.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "isa.h"

PYBIND11_MODULE(_extension, module) {
    module.doc() = "CPU kernels of metaprune.";
    module.def(
        "build_info",
        [] {
            pybind11::dict info;
            info["compiler"] = __VERSION__;
            info["flags"] = METAPRUNE_FLAGS;
            info["torch"] = TORCH_VERSION;
            info["instruction_set"] = metaprune::isa_name(metaprune::chosen_isa());
            return info;
        },
        "Compiler, flags and torch version of the build, and the instruction set chosen now. RuntimeError if "
        "METAPRUNE_ISA names one that this processor does not have.");
}
