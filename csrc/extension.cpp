// The Python module kernels._extension. Importing it registers the kernels (ops/); it also tells how it was
// built.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "isa.h"
#include "peak.h"

// Said by setup.py where it compiled none.
#ifndef METAPRUNE_NO_CUDA
#define METAPRUNE_NO_CUDA "the CUDA kernels were not compiled"
#endif

PYBIND11_MODULE(_extension, module) {
    module.doc() = "C++ and CUDA kernels of metaprune.";
    module.attr("no_cuda") = METAPRUNE_NO_CUDA;
    module.def(
        "build_info",
        [] {
            pybind11::dict info;
            info["compiler"] = __VERSION__;
            info["flags"] = METAPRUNE_FLAGS;
            info["torch"] = TORCH_VERSION;
            info["instruction_set"] = metaprune::isa_name(metaprune::chosen_isa());
            pybind11::list levels;
            for (const metaprune::Isa isa : metaprune::supported_isas())
                levels.append(metaprune::isa_name(isa));
            info["instruction_sets"] = levels;
            return info;
        },
        "Compiler, flags and torch version of the build, the instruction set chosen now and all that could "
        "be, "
        "the fastest first. RuntimeError if METAPRUNE_ISA names one that this processor does not have.");
    module.def(
        "peak_flops",
        [](double seconds, bool bf16) {
            const pybind11::gil_scoped_release others_may_run;
            return metaprune::peak_flops(metaprune::chosen_isa(), seconds, bf16);
        },
        pybind11::arg("seconds"), pybind11::arg("bf16") = false,
        "Operations per second of multiply-adds in registers, measured on this thread for about `seconds`.");
}
