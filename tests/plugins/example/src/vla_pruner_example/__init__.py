"""A method and a model family from outside of vla-pruner."""
