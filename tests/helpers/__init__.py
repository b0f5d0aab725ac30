"""What several test modules share, one idea per module."""
