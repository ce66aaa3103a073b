"""How many threads a process starts: no more than the processors that it may use."""

import builtins
import io
import os

import pytest
import torch

from oodcli.networks import devices
from oodcli.networks.devices import limit_threads, processors

QUOTA = {
    "v1": {
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    },
    "v2": {"/sys/fs/cgroup/cpu.max": "250000 100000"},
}
"""Two and a half processors."""


@pytest.fixture
def host(monkeypatch):
    """A host with 64 processors, without a quota; nothing stays limited."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(devices, "_most", None)
    before = torch.get_num_threads()
    yield pretend_files(monkeypatch)
    torch.set_num_threads(before)


def pretend_files(monkeypatch):
    """A mapping of the files under /sys/fs/cgroup that exist."""
    files = {}
    exists, opened = os.path.exists, builtins.open

    def pretended(path):
        return str(path).startswith("/sys/fs/cgroup/")

    def open_one(path, *args, **kwargs):
        return io.StringIO(files[path]) if pretended(path) else opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_one)
    monkeypatch.setattr(
        os.path, "exists", lambda path: path in files if pretended(path) else exists(path)
    )
    return files


@pytest.mark.parametrize("version", QUOTA)
def test_a_container_with_a_quota_has_fewer_processors(host, version):
    assert processors() == 64
    host.update(QUOTA[version])
    assert processors() == 3  # the last one for half of the time


def test_processes_of_torchrun_share_the_processors(host, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processors() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert processors() == 1


def test_threads_are_limited_to_the_processors(host, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(5)
    limit_threads()
    assert torch.get_num_threads() == 5  # torch's own number is smaller
    host.update(QUOTA["v2"])
    limit_threads()
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(5)
    limit_threads()
    assert torch.get_num_threads() == 5  # as the user wants it


def test_a_given_number_counts_for_decoding_too(host):
    limit_threads(2)
    assert torch.get_num_threads() == processors() == 2
    with pytest.raises(ValueError, match=r"limit_threads\(0\): expected a number of at least 1"):
        limit_threads(0)
