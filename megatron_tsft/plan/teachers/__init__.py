"""The kinds of teacher that there are; a new one is a file beside this one, and its name here."""

NAMES = ("none", "reference", "model", "cache")
