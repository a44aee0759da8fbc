"""Complete runs as YAML: pass one to `--config`, by path or by name."""
