"""Sweeps: one recipe in many variants, each of them an ordinary run over the same store."""
