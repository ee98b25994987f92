"""The recipe of a run as people write it: flags and a YAML file, checked before anything is imported."""
