"""From bytes to batches: source -> index -> sampler -> decode -> augment -> dataset -> loader. uint8 comes out."""
