"""Other people's trainers: a module each, which imports its own package (docs/integrations.md)."""
