"""Side-by-side timings against the models that a MoT replaces; README.md says how each figure is obtained."""
