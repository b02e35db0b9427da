"""The tools of an MCP server: what an agent does with runs. Imported by ``grd mcp`` alone."""
