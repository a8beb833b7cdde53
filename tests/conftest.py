"""What all tests share: one thread a worker, no network, markers that skip where the hardware is missing."""

import importlib.util
import os
import signal
import socket
from pathlib import Path

import pytest
import torch

# A shell that starts this in the background has Ctrl-C ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two workers share two cores; child processes inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    missing = {"gpu": not torch.cuda.is_available(), "cuda_packages": importlib.util.find_spec("mamba_ssm") is None}
    for item in items:
        for marker, skip in missing.items():
            if skip and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs what the marker {marker} names"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches beyond this machine fails instead of depending on who answers."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def repository() -> Path:
    return Path(__file__).resolve().parent.parent
