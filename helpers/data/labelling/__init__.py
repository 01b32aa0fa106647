"""How images get their labels: by folders, by a table, by a file of corrections."""
