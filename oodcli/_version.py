"""The version, which the files that oodcli writes name."""

__version__ = "0.1.0"
