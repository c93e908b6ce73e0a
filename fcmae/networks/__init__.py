"""Networks, one file each: blocks, encoder, starting distributions, layers for layer decay. Their numbers: spec.py."""
