"""The version, which oodcli writes to its files."""

__version__ = "0.1.0"
