"""The surfaces: command line now, Jupyter and MCP later."""
