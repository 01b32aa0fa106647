"""What a model's predictions are worth."""
