"""A small MCP server as people write them: `python mcp_program.py stdio`, `sse PORT` or `http PORT`.

Two of its tools are needed together to answer "what does Ada's order cost": the first finds an id, the second a price.
"""

from __future__ import annotations

import os
import sys

from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations

server = MCPServer("shop")
READS = ToolAnnotations(read_only_hint=True)
ORDERS = {"ada": "A-17", "grace": "G-42"}
PRICES = {"A-17": 129, "G-42": 250}


@server.tool(annotations=READS)
def find_order(customer: str) -> str:
    """Find the id of a customer's order by the customer's first name."""
    return f"The order id of {customer} is {ORDERS[customer.lower()]}."


@server.tool(annotations=READS)
def get_price(order_id: str) -> str:
    """Get the price in euros of an order by its order id."""
    return f"The order {order_id} costs {PRICES[order_id]} euros."


@server.tool()
def cancel_order(order_id: str) -> str:
    """Cancel an order."""
    return f"cancelled {order_id}"


@server.tool(annotations=READS)
def environment() -> str:
    """List the names of the environment variables."""
    return " ".join(sorted(os.environ))


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("sse" if sys.argv[1] == "sse" else "streamable-http", port=int(sys.argv[2]))
