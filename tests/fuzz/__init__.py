"""Damaged and hostile input with fixed seeds: `python -m tests.fuzz --folders 500 --messages 20000 --records 500`."""
