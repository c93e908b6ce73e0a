"""From files to batches: index -> sampler -> decode -> augment -> dataset -> loader. uint8 comes out."""
