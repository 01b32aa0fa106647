"""What `compile` and `fit` are given, and what they leave."""
