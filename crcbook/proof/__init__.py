"""What has to be trusted: everything that turns an evaluation of a network into a bound."""
