"""docs/benchmarks.md, made from the results of the scripts: tables, plots, hardware and versions."""
