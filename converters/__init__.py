"""Converters: from a manifesto to files that a runtime attaches."""
