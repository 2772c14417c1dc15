"""Predictions of unlabelled images as the labels of new data."""
