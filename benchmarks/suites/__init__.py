"""The suites: shapes, cells and sizes, the jobs of a run, and the suite `machine`."""
