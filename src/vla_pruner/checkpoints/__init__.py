"""Checkpoint folders of strangers: files, weights and numbers, looked at before anything is made of them."""
