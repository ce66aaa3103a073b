"""Virtual images: the impressions that a network keeps of its classes in its BatchNorm layers."""
