"""The only place with hooks: a Classifier and a batch of images become Features."""
