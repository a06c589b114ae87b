"""The suites: the sizes they measure (`shapes`, `cells`) and the suite `machine`."""
