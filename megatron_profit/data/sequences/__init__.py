"""Examples -> rows of a fixed length, in an order that follows from the seed."""
