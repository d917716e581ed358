"""Commands that make data sets from packages of real data; a source of a recipe can name the result as its `path`."""
