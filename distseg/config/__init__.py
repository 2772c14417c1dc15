"""Configuration: the typed schema, and loading it from presets, files and overrides."""
