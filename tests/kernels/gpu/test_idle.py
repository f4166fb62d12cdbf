"""Subnetworks of no channels in the kernels of a GPU, in processes of their own (idle.py)."""

from test_parity import run_on_cuda, run_on_triton


def test_every_triton_kernel_passes_over_subnetworks_of_no_channels() -> None:
    run_on_triton("idle.py")


def test_every_cuda_kernel_passes_over_subnetworks_of_no_channels() -> None:
    run_on_cuda("idle.py")
