"""The fuzz itself: good inputs pass, harm is seen, and a short form of it over all entry points."""
