"""What to check before a user trusts a classifier: calibration, promises, novelty, explanation, cheats."""
