"""A checkpoint becomes a Classifier."""
