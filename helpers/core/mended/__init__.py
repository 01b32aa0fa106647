"""What other packages get wrong, put right."""
