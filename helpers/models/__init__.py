"""Networks: a backbone by its name, a head on top, and the choice of the weights that train."""
