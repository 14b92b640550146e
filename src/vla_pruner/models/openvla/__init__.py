"""OpenVLA and OpenVLA-OFT, written anew on the installed transformers."""
