"""Side-by-side measurements: each module runs alone (``python -m benchmarks.aa``) and prints the tables docs quote."""
