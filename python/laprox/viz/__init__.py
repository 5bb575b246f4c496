"""Pictures of what is measured elsewhere: charts, self-contained HTML pages, shaded text."""
