"""Commands that turn installed packages of real data into data sets that a source can name as its `path`."""
