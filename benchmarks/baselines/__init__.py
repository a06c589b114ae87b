"""The providers: the package and other ways to write the same layer."""
