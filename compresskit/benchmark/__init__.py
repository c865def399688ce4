"""Every method, every factor, one table: the grid, its cells, what is measured, the records."""
