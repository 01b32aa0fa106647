"""Thaw: transfer learning for image classification, as notebooks.

Importing this package never loads TensorFlow; only the modules that build or train models do.
"""
