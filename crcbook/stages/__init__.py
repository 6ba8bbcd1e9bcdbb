"""What need not be trusted: searches for points at which a bound is proved."""
