"""The corpus formats, one file per format or family of formats, and their registry."""
