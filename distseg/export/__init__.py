"""A trained segmentor as a file for others."""
