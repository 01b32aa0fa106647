"""What every notebook and command stands on.

Paths, files, a stage's folder, its parameters, progress, work on many cores.
"""
