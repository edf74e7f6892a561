"""What was asked for: every option, the words that become options, and what they come to."""
