"""Every network to choose from, measured."""
