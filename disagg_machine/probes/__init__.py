"""Programs for other Pythons than the one that runs this package: standard library only, run by their path."""
