"""Everything that is measured on a lent GPU, in one command that fits into ten minutes; see docs/gpu.md."""
