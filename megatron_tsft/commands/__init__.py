"""The commands that a user runs: each parses, calls and prints."""
