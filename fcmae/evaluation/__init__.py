"""What a pretrained encoder is worth: models -> features -> probes, and what its features look like."""
