"""Images labelled by a trained segmentor."""
