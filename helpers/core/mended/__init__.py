"""Corrections of errors in other packages."""
