"""On which processes a run happens: launchers, collectives, signals, and ending together."""
