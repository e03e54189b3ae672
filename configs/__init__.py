"""What a run is: the typed schema, the YAML loader and the shipped run files."""
