"""The making of the two-camera policies: recordings, training and DAgger; see reference/README.md."""
