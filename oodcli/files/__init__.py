"""The formats that the stages exchange."""
