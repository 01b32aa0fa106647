"""Recipes become runs: the chain of notebooks and the store that keeps their results."""
