"""What should be known before a classifier is believed: calibration, promises, novelty, explanation, cheats."""
