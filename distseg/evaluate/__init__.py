"""Evaluation: exact scores of a run, and tables of them."""
