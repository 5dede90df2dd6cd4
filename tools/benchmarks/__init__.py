"""The parts of tools/benchmark_loss.py: inputs, peers, measurement, report, targets, plot."""
