"""Self-contained HTML reports: one file, no requests to anywhere."""
