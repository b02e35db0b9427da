"""The surfaces: command line, Jupyter, MCP."""
