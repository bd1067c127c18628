"""Everything a run measured, as report.json, as a page, and as tables in the terminal."""
