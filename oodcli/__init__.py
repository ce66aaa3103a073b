"""Tells which inputs a trained image classifier should not be trusted on, from its checkpoint."""

__version__ = "0.1.0"
