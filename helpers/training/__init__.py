"""What `compile` and `fit` get, and what they leave."""
