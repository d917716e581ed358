"""Bad inputs, seeded, over the public entry points: `python -m tests.fuzz --count 1000`."""
