"""A study: one base recipe in several variants, sizes and seeds, compared with spreads: `python -m training.study`."""
