"""Several runs as one classifier: ensembles, model soups and two-stage classifiers, chosen on validation."""
