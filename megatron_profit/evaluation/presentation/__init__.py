"""Results for people: tables, a figure, and a page of answers."""
