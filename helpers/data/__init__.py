"""From raw files to train, val and test images of one size, without leaks."""
