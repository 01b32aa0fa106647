"""What a bundle carries as it is: to read images, to classify them, to verify itself, and to serve."""
