"""Where in a program rows become one value, for the lines of a report."""
