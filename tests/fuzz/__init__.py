"""Mutated inputs with fixed seeds: whatever is read ends in a result or in one sentence."""
