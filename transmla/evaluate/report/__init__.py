"""An evaluation as data, tables, plots, one HTML file, and a section of a model card."""
