"""What draws a report: as a page, in the terminal, as a model card."""
