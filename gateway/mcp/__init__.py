"""Tools of MCP servers, called here for models that ask for them. Above: `responses`, `routes.chat`, `routes.mcp`."""
