"""What a bundle carries unchanged: to read images, to classify them, to verify itself, and to serve."""
