"""What files of single formats declare: chunks of a PNG, pixels of more than 8 bits, kinds of JPEG."""
