"""The layers that are timed: the package and the ways people write the same layer today."""
