"""What deploy/ shows, run or judged by the tools that it is meant for."""
