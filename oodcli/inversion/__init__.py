"""Virtual images, inverted from the BatchNorm statistics of a network."""
