"""What stands in deploy/, judged by the checkers of the tools that it is for."""
