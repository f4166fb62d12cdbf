"""Subnetworks of no channels in the kernels of a GPU, in processes of their own (idle.py)."""

import pytest
import test_parity


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_every_kernel_passes_over_subnetworks_of_no_channels(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_parity, "PARITY", test_parity.PARITY.with_name("idle.py"))
    getattr(test_parity, f"test_every_{kernels}_kernel_passes_the_tests_of_its_op")()
