"""All checks and measurements on a GPU in one command that fits into ten minutes; see docs/gpu.md."""
