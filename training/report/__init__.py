"""Curves and tables of one or several runs, from their folders alone."""
