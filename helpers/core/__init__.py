"""What every notebook and command uses.

Paths, files, a stage's folder, its parameters, progress, work on many cores.
"""
