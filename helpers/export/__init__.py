"""What is delivered: a model as a bundle that needs neither Thaw nor TensorFlow, and its proof."""
