"""The model of a recipe: what fits together, how it is built, what it costs."""
