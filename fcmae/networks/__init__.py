"""Networks, one file each: blocks, encoder, starting distributions. Their numbers: spec; what they share: encoder."""
