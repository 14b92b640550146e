"""How the two-camera policies were made: recordings, training and DAgger; see reference/README.md."""
