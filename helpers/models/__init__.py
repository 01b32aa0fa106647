"""Networks: a backbone by its name, a head on top, and which of its weights train."""
