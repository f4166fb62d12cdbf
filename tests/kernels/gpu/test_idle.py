"""Subnetworks of no channels in the Triton kernels, in a process of their own (idle.py)."""

import pytest
import test_parity


def test_every_kernel_passes_over_subnetworks_of_no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_parity, "PARITY", test_parity.PARITY.with_name("idle.py"))
    test_parity.test_every_kernel_passes_the_tests_of_its_op()
