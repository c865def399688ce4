"""The report of a benchmark: tables, pictures and a page, all views of its records."""
