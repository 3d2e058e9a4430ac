"""What an operator sees of a server: counters on their way from its engines to its front ends."""
