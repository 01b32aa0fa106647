"""The command `thaw`: arguments in, lines on the terminal out."""
