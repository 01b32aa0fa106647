"""What files of single formats say of themselves: chunks of a PNG, pixels of more than 8 bits, kinds of JPEG."""
