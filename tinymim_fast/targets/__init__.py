"""What is distilled."""
