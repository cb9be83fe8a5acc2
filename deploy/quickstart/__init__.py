"""The quickstart's trainer and engine."""
