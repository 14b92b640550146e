"""Checkpoint folders from untrusted sources: files, weights and numbers are checked before anything is made of them."""
