"""Side-by-side timings against the models that a MoT replaces. README.md explains how each figure is obtained."""
