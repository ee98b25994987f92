"""Tasks in lm-eval's YAML form, each over a local file; `lm_eval --include_path` can read them too."""
