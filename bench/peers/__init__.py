"""Other engines as small programs that speak JSON lines; each runs in the environment that has its package."""
