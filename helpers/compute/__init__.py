"""Where a model runs and how it runs fast: devices, precision, ranks, and the frozen frontier.

The part below the frontier is computed once.
"""
