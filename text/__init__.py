"""Text: token files and how they are written, the standard library's sources as bytes, a small GPT."""
