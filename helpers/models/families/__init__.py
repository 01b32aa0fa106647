"""Families of backbones, one module each: the names in it, how each is built, and where its ImageNet weights are."""
