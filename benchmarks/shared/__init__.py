"""What more than one benchmark needs, and the parts of benchmarks/loss.py."""
