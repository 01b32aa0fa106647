"""Where a model runs and how it runs fast: devices, precision, ranks, and the frozen frontier.

What lies below the frontier is computed once.
"""
