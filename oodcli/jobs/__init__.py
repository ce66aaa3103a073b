"""How work is split between processes and hosts."""
