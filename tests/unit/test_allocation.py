"""Commands keep freed memory for the next blocks, unless the user has set malloc's variables."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import os
import oodcli.cli.library

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident()
block = bytearray(b"1") * 2**27
del block
print((resident() - before) / 2**27)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(("given", "share"), [({}, 1), ({"MALLOC_ARENA_TEST": "8"}, 0)])
def test_a_command_keeps_a_freed_block(given, share):
    usual = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=usual | given, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(share, abs=0.1)
